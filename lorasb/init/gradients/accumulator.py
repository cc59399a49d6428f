"""Sums of weight gradients from hooks: `dyᵀ x` in fp32, without any weight that requires a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.registry import backend_op, current_backend
from ...ops.weight_gradient import BAD, SQUARES, ZEROS
from ..linalg.sign_bits import SignBits
from ..linalg.svd import energies


def _op(name: str) -> Callable[..., Any]:
    from ... import backends  # noqa: F401  registers them

    return backend_op(name, current_backend())


class LayerSum:
    """ΣG [out, in] of one layer: its fp32 sum, or what one call gave: dy and x where they take less room than the sum.

    Args:
        halves: keep the sum over the first half of the samples too.
    """

    def __init__(self, halves: bool = False) -> None:
        self.total: Tensor | None = None
        self.half: Tensor | None = None
        self.halves = halves
        self._pair: tuple[Tensor, Tensor] | None = None
        self._closed: tuple[SignBits, Tensor] | None = None  # signs; Σ G², zeros, not finite

    def add(self, dy: Tensor, x: Tensor, last: bool = False, first_half: bool = False) -> None:
        """G += dyᵀ x for dy [..., out] and x [..., in]; `last` takes the signs in the same go."""
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if first_half and self.halves:
            fresh, self.half = self.half is None, _room(self.half, dy, x)
            _op("gradient_add")(dy, x, self.half, fresh)
        if last and self.total is None and self._pair is None and _leaner(dy, x):
            self._pair = dy, x
            self._close(dy, x, None, True)
            return
        self._settle()
        fresh, self.total = self.total is None, _room(self.total, dy, x)
        if last:
            self._close(dy, x, self.total, fresh)
        else:
            self._closed = None
            _op("gradient_add")(dy, x, self.total, fresh)

    def _close(self, dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> None:
        words, nonzero, counts = _op("gradient_signs")(dy, x, total, fresh)
        counts = counts.cpu()
        shape = (dy.shape[1], x.shape[1])
        self._closed = SignBits(words, shape, nonzero if counts[ZEROS] or counts[BAD] else None), counts

    def _settle(self) -> None:
        """Turn a kept pair into a sum."""
        if self._pair is not None:
            self.total = _room(None, *self._pair)
            _op("gradient_add")(*self._pair, self.total, True)
            self._pair = None

    def value(self) -> Tensor:
        """G [out, in]."""
        self._settle()
        if self.total is None:
            raise RuntimeError("nothing was added to this sum")
        return self.total

    def merge(self, total: Tensor) -> None:
        """Take over a sum that several processes made."""
        self.total, self._pair, self._closed = total, None, None

    def signs(self) -> SignBits:
        """sign(G)."""
        return self._counted()[0]

    @property
    def squares(self) -> float:
        """‖G‖²."""
        return float(self._counted()[1][SQUARES])

    @property
    def zeros(self) -> int:
        """Exact zeros of G."""
        return int(self._counted()[1][ZEROS])

    @property
    def finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return int(self._counted()[1][BAD]) == 0

    def _counted(self) -> tuple[SignBits, Tensor]:
        if self._closed is None:
            total = self.value()
            self._close(total.new_empty(0, total.shape[0]), total.new_empty(0, total.shape[1]), total, False)
        if self._closed is None:
            raise RuntimeError("nothing was added to this sum")
        return self._closed

    def curve(self, u: Tensor, vt: Tensor) -> Tensor:
        """‖U_kᵀ G V_k‖² for k = 1 ... q, with U [out, q] and Vᵀ [q, in]."""
        if self._pair is not None:
            dy, x = (part.to(u.dtype) for part in self._pair)
            core = (dy @ u).t() @ (x @ vt.t())
        else:
            total = self.value()
            core = u.t().to(total.dtype) @ total @ vt.t().to(total.dtype)
        return energies(core)

    def half_signs(self) -> tuple[SignBits, SignBits] | None:
        """sign(G) over each half of the samples, where halves were kept and both have any."""
        if self.half is None:
            return None
        rest = self.value() - self.half
        return (SignBits.pack(self.half), SignBits.pack(rest)) if rest.any() else None


def _room(total: Tensor | None, dy: Tensor, x: Tensor) -> Tensor:
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return total if total is not None else dy.new_empty((dy.shape[1], x.shape[1]), dtype=wide)


def _leaner(dy: Tensor, x: Tensor) -> bool:
    """Whether dy and x take less memory than their fp32 product."""
    return dy.numel() * dy.element_size() + x.numel() * x.element_size() < 4 * dy.shape[1] * x.shape[1]


class GradientSums:
    """Adds up `dyᵀ x` of linear layers while their outputs are differentiated.

    A context manager: hooks are there inside the block only. Outputs that no graph reaches yet are made leaves that
    require a gradient, so backward arrives at every layer although all weights are frozen.

    Attributes:
        sums: of the layers that backward reached.
        called: names of the layers that ran, whether backward came back to them or not.
        elsewhere: names of those that ran when they were not wanted.
        closing: set it before the last forward: the last sum of a layer takes the signs in the same go.
        muted: set it for a forward whose gradients do not count.
        first_half: set it for a forward that belongs to the first half of the samples.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], halves: bool = False, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        self.layers = layers
        self.sums: dict[str, LayerSum] = {}
        self.called: set[str] = set()
        self.elsewhere: set[str] = set()
        self.closing = self.muted = self.first_half = False
        self.halves, self._wanted = halves, wanted
        self._pending: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> GradientSums:
        self._handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def leave_out(self, names: set[str]) -> None:
        """Forget layers, as if they had not run."""
        self.called -= names
        for name in names:
            self.sums.pop(name, None)

    def totals(self) -> dict[str, Tensor]:
        """ΣG by layer name."""
        return {name: found.value() for name, found in self.sums.items()}

    def _hook(self, name: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or inputs[0].numel() == 0:  # experts are often called with no token
                return None
            if not self._wanted():
                self.elsewhere.add(name)
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_(True).clone()
            if self.muted:
                return output
            self.called.add(name)
            x = inputs[0].detach()
            self._pending[name] = self._pending.get(name, 0) + 1
            half = self.first_half
            output.register_hook(lambda dy: self._add(name, dy, x, half))
            return output.view_as(output)  # what others hook (the loss rescales logits) comes before our hook

        return forward

    @torch.no_grad()
    def _add(self, name: str, dy: Tensor, x: Tensor, first_half: bool) -> None:
        self._pending[name] -= 1
        if name not in self.sums:
            self.sums[name] = LayerSum(self.halves)
        self.sums[name].add(dy, x, self.closing and self._pending[name] == 0, first_half)
