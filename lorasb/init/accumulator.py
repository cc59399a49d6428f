"""Sum weight gradients in hooks, ΣG += dyᵀ x in fp32, for weights without a gradient (quantized, sharded)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends  # noqa: F401  registers the ops of every backend
from ..layers.weight_adapter import SLICE, LoRASBWeight
from ..ops.registry import BAD, SQUARES, ZEROS, backend_op, current_backend
from ..utils.precision import WITHOUT_FP64, factorable
from .svd import MomentSketch, SignBits, energies


@dataclass(frozen=True)
class GradientSigns:
    """sign(G) of one layer, with statistics of G's values."""

    bits: SignBits
    squares: float  # ‖G‖²
    zeros: int  # number of entries of G that are exactly zero
    finite: bool  # True if no entry of G is NaN or infinite


class LayerSum:
    """ΣG [out, in] of one layer, in fp32 (fp64 for fp64 models); with a `sketch`, also the samples' second moments."""

    def __init__(self, sketch: MomentSketch | None = None) -> None:
        self.total: Tensor | None = None
        self.sketch = sketch
        self._signs: GradientSigns | None = None

    def add(self, dy: Tensor, x: Tensor, last: bool = False) -> None:
        """Add dyᵀ x to G for dy [..., out] and x [..., in]; on the `last`, the kernel's epilogue packs the signs."""
        if self.sketch is not None:
            self.sketch.add(dy, x)
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        self._signs, fresh = None, self.total is None
        if self.total is None:
            # bf16 has 8 bits of mantissa: a sum over many tokens would stop growing.
            wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
            self.total = dy.new_empty((dy.shape[1], x.shape[1]), dtype=wide)  # fresh: the op overwrites it
        takes_signs = last and dy.device.type not in WITHOUT_FP64  # counts are fp64
        (self._take_signs if takes_signs else _op("gradient_add"))(dy, x, self.total, fresh)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to G a gradient [out, in] that the layer itself computed."""
        if self.sketch is not None:
            raise ValueError(
                "update='per-sample' needs dy and x of linear layers, but a target is an embedding, a convolution or "
                "attention: name it in exclude_modules, or choose another update"
            )
        self._signs, gradient = None, gradient if gradient.dtype == torch.float64 else gradient.float()
        if self.total is None:
            self.total = gradient.clone(memory_format=torch.contiguous_format)
        else:
            self.total.add_(gradient)

    def _take_signs(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> GradientSigns:
        """Add dyᵀ x to `total`, and return the signs and counts of the result."""
        words, nonzero, counts = _op("gradient_signs")(dy, x, total, fresh)
        counts = counts.cpu()  # one synchronization per layer, instead of one for each count that is read
        # Without zeros or NaN, the nonzero plane is all ones and is dropped to save memory.
        bits = SignBits(words, (dy.shape[1], x.shape[1]), nonzero if counts[ZEROS] or counts[BAD] else None)
        self._signs = GradientSigns(bits, float(counts[SQUARES]), int(counts[ZEROS]), not counts[BAD])
        return self._signs

    def value(self) -> Tensor:
        """G [out, in], on a device that can factor it; call it after the last addition."""
        if self.total is None:
            raise RuntimeError("nothing was added to this sum")
        self.total = factorable(self.total)
        return self.total

    def signs(self) -> GradientSigns:
        """Return sign(G), computed in the `last` addition or here."""
        if self._signs is not None:
            return self._signs
        total = self.value()
        # The op with no tokens (dy [0, out], x [0, in]) adds nothing and takes the signs of `total`.
        dy, x = (total.new_empty(0, side) for side in total.shape)
        return self._take_signs(dy, x, total, False)

    def curve(self, u: Tensor, vt: Tensor) -> Tensor:
        """‖U_kᵀ G V_k‖² for k = 1 ... q, with U [out, q] and Vᵀ [q, in]."""
        total = self.value()
        return energies(u.t().to(total.dtype) @ total @ vt.t().to(total.dtype))


def _op(name: str) -> Callable[..., tuple[Tensor, ...]]:
    return backend_op(name, current_backend())


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes; 0 for inference tensors, which cannot change outside inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class GradientSums:
    """Context manager that sums each layer's dyᵀ x, by name, whenever a backward reaches the layer's output.

    A forward counts only if `active` returns True. `sketch(name)` returns a layer's empty `MomentSketch`, or None.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        active: Callable[[], bool] = lambda: True,
        sketch: Callable[[str], MomentSketch | None] = lambda name: None,
    ) -> None:
        self.layers, self.sketch, self._active = layers, sketch, active
        self.sums: dict[str, LayerSum] = {}  # only of layers that backward reached
        self.called: set[str] = set()  # the layers that ran, whether backward reached them or not
        self.called_inactive: set[str] = set()  # the layers that ran while `active` was false
        self.closing = False  # set before the last forward: a layer's last addition then also takes the signs
        self.muted = False  # set for a forward whose gradients do not count
        self._pending: Counter[str] = Counter()  # calls whose backward is still to come
        self._hooks = ExitStack()

    def __enter__(self) -> GradientSums:
        for name, layer in self.layers.items():
            if isinstance(layer, LoRASBWeight):
                layer.tap = partial(self._tap, name, layer)
                self._hooks.callback(setattr, layer, "tap", None)
            else:
                self._hooks.enter_context(layer.register_forward_hook(partial(self._hook, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _ignores(self, name: str) -> bool:
        """True if a forward of a layer is not summed."""
        if not torch.is_grad_enabled():
            return True
        active = self._active()
        if not active:
            self.called_inactive.add(name)
        return not active

    def _hook(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        # No tokens: models often call an expert even if nothing was routed to it.
        if inputs[0].numel() == 0 or self._ignores(name):
            return None
        if not output.requires_grad:
            # With all weights frozen, there is no graph up to this point. `clone`: models change outputs in place
            # (`+=`), which autograd forbids for a leaf that requires gradients.
            output = output.detach().requires_grad_(True).clone()
        if self.muted:  # still in the graph: under FSDP2 every rank has to run the same backward
            return output
        self.called.add(name)
        self._pending[name] += 1
        # For 3-D inputs F.linear returns a view, and an in-place operation on the view would bypass its hook: hook the
        # underlying product instead. A quantizer's function may return a view of a tensor without gradient.
        root = output if output._base is None else output._base
        is_whole = root.numel() == output.numel() and root.is_contiguous() and output.is_contiguous()
        if not (is_whole and root.requires_grad):
            root = output = output.clone()
        x = inputs[0].detach()  # shares the input's version counter
        root.register_hook(partial(self._add, name, x, version_of(x)))
        # Tensor hooks run in registration order, so hooks that others later register on this output (the loss
        # rescales the gradient at the logits) would run after ours. On a view, nearer to the loss, they run first.
        return output.view_as(output)

    def _tap(self, name: str, layer: LoRASBWeight, weight: Tensor) -> Tensor:
        """Hook a weight on its way into its module, for layers whose weight gradient is not dyᵀ x."""
        if self._ignores(name):
            return weight
        tapped = weight.detach().requires_grad_(True).view_as(weight)
        if not self.muted:
            # All experts of a parameter pass through here, even those without routed tokens, which have not run.
            if layer.unfolding.kind != SLICE:
                self.called.add(name)
            tapped.register_hook(partial(self._add_own, name, layer))
        return tapped

    @torch.no_grad()
    def _add_own(self, name: str, layer: LoRASBWeight, gradient: Tensor) -> None:
        if layer.unfolding.kind != SLICE or gradient.any():
            self.called.add(name)
            self._sum_of(name).add_gradient(layer.base.matrix(gradient))

    def _sum_of(self, name: str) -> LayerSum:
        if name not in self.sums:
            self.sums[name] = LayerSum(self.sketch(name))
        return self.sums[name]

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, version: int, dy: Tensor) -> None:
        if version_of(x) != version:  # autograd would raise too, if the weight trained
            raise ValueError(
                f"the input of layer {name!r} was changed in place after it ran: write x = x + y, not x += y"
            )
        dy = dy.reshape(*x.shape[:-1], dy.shape[-1])
        self._pending[name] -= 1
        # A layer may run several times in a forward (shared modules): only its last backward completes the sum.
        self._sum_of(name).add(dy, x, self.closing and self._pending[name] == 0)
