"""`LoRASBWeight`: an adapter for parameters other than a linear's weight: embeddings, convolutions, attention.

W + s·B R A takes the parameter's place while the module computes; an embedding looks its rows up in A instead. The
matrix W [out, in] is the parameter unfolded (`unfolding`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..compat.torch import SAME_WIDTHS, convolve
from .adapted_layer import AdaptedLayer
from .adapter_state import Rows
from .base import Base, innermost


class ParameterSlice(nn.Module):
    """A view of a parameter W [a, b], or of matrix `index` of a parameter [E, a, b]; it holds no tensor."""

    def __init__(self, owner: nn.Module, name: str, index: int | None) -> None:
        super().__init__()
        self._owner = [owner]  # in a list: a submodule's parameters would count once per slice
        self.name, self.index = name, index
        self.training = owner.training

    @property
    def weight(self) -> Tensor:
        """The matrix, in the parameter's memory."""
        parameter = self._owner[0].get_parameter(self.name)
        return parameter if self.index is None else parameter[self.index]


_swapping = threading.RLock()


def alone(swaps: bool = True) -> AbstractContextManager[object]:
    """Let one thread at a time compute with W + s·B R A in W's place, where other threads would read it as W."""
    return _swapping if swaps and not torch.compiler.is_compiling() else nullcontext()


EMBEDDING, CONVOLUTION, ATTENTION, SLICE = "embedding", "convolution", "attention", "parameter"
KINDS_WITH_WEIGHT = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Unfolding(NamedTuple):
    """A parameter seen as a matrix."""

    kind: str  # of the module
    path: str  # name of the parameter in the module
    stored: tuple[int, ...]  # its shape

    @property
    def largest_rank(self) -> int:
        return min(self.stored[0], math.prod(self.stored[1:]))


def unfoldings(module: nn.Module) -> list[Unfolding]:
    """Return the parameters of a module to adapt, innermost first; none for unsupported modules."""
    # Unsupported: attention with separate key or value widths, which has three matrices; weights that are computed in
    # every forward (weight_norm, spectral_norm); embeddings that rescale what they look up (max_norm).
    if isinstance(module, ParameterSlice):
        return [Unfolding(SLICE, "weight", tuple(module.weight.shape))]
    if isinstance(module, KINDS_WITH_WEIGHT):
        weight = module._parameters.get("weight")
        if weight is None or getattr(module, "max_norm", None) is not None:
            return []
        kind = EMBEDDING if isinstance(module, nn.Embedding) else CONVOLUTION
        return [Unfolding(kind, "weight", tuple(weight.shape))]
    if isinstance(module, nn.MultiheadAttention) and module._parameters.get("in_proj_weight") is not None:
        paths = {"out_proj.weight": module.out_proj.weight, "in_proj_weight": module.in_proj_weight}
        return [Unfolding(ATTENTION, path, tuple(matrix.shape)) for path, matrix in paths.items()]
    return []


class ParameterBase(Base):
    """An unfolded parameter of the innermost module, which reads it in its own forward."""

    def __init__(self, module: nn.Module, unfolding: Unfolding) -> None:
        super().__init__(module)
        self.unfolding = unfolding

    def parameter(self) -> Tensor:
        return cast(Tensor, attrgetter(self.unfolding.path)(innermost(self.module)))

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t() if self.unfolding.kind == EMBEDDING else stored.flatten(1)

    def folded(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self.unfolding.kind == EMBEDDING else matrix.reshape(self.unfolding.stored)

    def must_run(self) -> bool:
        return True

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Base:
        # Write merged values into the parameter's memory, which may be a slice of another's.
        self.parameter().copy_(weight)
        return self


class EmbeddingBase(ParameterBase):
    """The weight of an embedding; while adapters are merged, a head tied to it is separated from it."""

    own: Tensor | None = None  # the embedding's own parameter meanwhile

    def merged(self, weight: Tensor) -> Base:
        # Give the embedding a separate parameter: a head tied to it stays on the old one.
        module = innermost(self.module)
        self.own = module.weight if self.own is None else self.own
        module.weight = nn.Parameter(weight, requires_grad=False)
        return self

    def restored(self) -> Base | None:
        if self.own is None:
            return None
        module = innermost(self.module)
        # Restore the same parameter, as a head may be tied to it; the model may have been moved or cast meanwhile.
        self.own.data = self.own.data.to(module.weight.device, module.weight.dtype)
        module.weight, self.own = self.own, None
        return self


class _Wrapper(nn.Module):
    """A wrapper that exposes the attributes of its `base_layer`, which modules around attention read."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without adapters, after merging those of `adapter_names` if `merge`; PEFT calls it."""
        for layer in self.adapted() if merge else ():
            layer.merge(safe_merge, adapter_names)
        return cast(nn.Module, innermost(self))


class LoRASBWeight(_Wrapper, AdaptedLayer):
    """A module with W [out, in] + s·B R A in place of W, unfolded; may wrap a `LoRASBWeight` of another parameter.

    Takes the options of `LoRASBLinear`; `lora_dropout` applies to a convolution's x.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, unfolding: Unfolding, **options: Any) -> None:
        self.unfolding = unfolding  # which parameter, and how to view it as a matrix
        # set while an initialization sums gradients: applied to W before the module uses it
        self.tap: Callable[[Tensor], Tensor] | None = None
        super().__init__(base_layer, adapter_name, **options)
        setattr(self, SAME_WIDTHS, False)

    def _make_base(self, module: nn.Module) -> Base:
        kind = EmbeddingBase if self.unfolding.kind == EMBEDDING else ParameterBase
        return kind(module, self.unfolding)

    def add_adapter(self, adapter_name: str, *args: Any, **options: Any) -> None:
        """Add an adapter, also to the module's other parameters."""
        super().add_adapter(adapter_name, *args, **options)
        inner = self.base_layer
        if isinstance(inner, LoRASBWeight) and adapter_name not in inner.lorasb_R:
            inner.add_adapter(adapter_name, *args, **options)

    def adapted(self) -> list[LoRASBWeight]:
        """This layer, and those of the module's other parameters."""
        inner = self.base_layer
        return [self, *(inner.adapted() if isinstance(inner, LoRASBWeight) else ())]

    def forward(self, *args: object, adapter_names: Rows | Sequence[str] | None = None, **kwargs: object) -> object:
        """The module's output with W + s·B R A of the active adapters."""
        with alone(self._swaps()):
            if adapter_names is not None:
                return self._by_rows(adapter_names, *args, **kwargs)
            return self._with(self._names(), *args, **kwargs)

    def _swaps(self) -> bool:
        """True if another weight takes W's place while the module computes; convolutions add their update to y."""
        return self.tap is not None or self.unfolding.kind != CONVOLUTION

    def changed_weight(self) -> Tensor | None:
        """W + s·B R A of the active adapters, in the parameter's layout; None if W is unchanged."""
        names = self._names()
        return self._weight(names) if names or self.tap is not None else None

    def _names(self) -> list[str]:
        """Return the active adapters; unmerge if adapters are disabled, as PEFT's layers do in forward."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.disable_adapters or self.merged else self.active_here()

    def _with(self, names: list[str], *args: object, **kwargs: object) -> object:
        """Return the module's output with the adapters `names`."""
        if not names and self.tap is None:
            return self.base_layer(*args, **kwargs)
        self._refuse_offloaded(names)
        if self.unfolding.kind == CONVOLUTION and self.tap is None:
            return self._convolved_separately(names, *args, **kwargs)  # type: ignore[arg-type]
        path, inner = self.unfolding.path, self.base_layer
        while isinstance(inner, LoRASBWeight):  # of another parameter of the module
            path, inner = f"base_layer.{path}", inner.base_layer
        return functional_call(self.base_layer, {path: self._weight(names)}, args, kwargs)

    def _weight(self, names: list[str]) -> Tensor:
        weight = self.base.parameter()
        if self.tap is not None:
            weight = self.tap(weight)
        for name in names:
            weight = weight + self._delta(name).to(weight.dtype)
        return weight

    def _refuse_offloaded(self, names: list[str]) -> None:
        if self.base.parameter().is_meta or any(self.lorasb_A[name].is_meta for name in names):
            raise RuntimeError(
                f"a {type(self.get_base_layer()).__name__} under an adapter cannot be offloaded, as its weight is read "
                "outside of its forward: keep it on its device, or name it in exclude_modules"
            )

    def _convolved_separately(self, names: list[str], input: Tensor) -> Tensor:
        """base(x) + conv(dropout(x), s·B R A): in 16 bits W + s·B R A would round small updates away."""
        # torch's convolutions call their argument `input`; any other argument is a TypeError
        base, x = self.get_base_layer(), input
        y: Tensor = self.base_layer(x)
        for name in names:
            dropped = nn.functional.dropout(x, self.adapters[name].lora_dropout, self.training)
            y = y + convolve(base, dropped, self._delta(name).to(x.dtype))
        return y

    def _by_rows(self, rows: Rows | Sequence[str], *args: object, **kwargs: object) -> Tensor:
        """Return the output with one adapter per row of x."""
        given = args or (kwargs.pop("input"),)
        x, args = cast(Tensor, given[0]), given[1:]
        if self.unfolding.kind == ATTENTION:
            raise ValueError("adapter_names choose adapters by the rows of one input, but attention has three")
        rows = self.checked_rows(x, rows)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for i, name in enumerate(rows.names):
            if self.disable_adapters or name not in self.lorasb_R:
                continue
            indices = (rows.index == i).nonzero().flatten().to(x.device)
            part = cast(Tensor, self._with([name], x[indices], *args, **kwargs))
            y = y.index_copy(0, indices, part.to(y.dtype))
        return y


class LoRASBEmbedding(LoRASBWeight):
    """An embedding with rows W[:, id] + s·B R A[:, id]: A [r, num_embeddings], B [dim, r]."""

    def _swaps(self) -> bool:
        """True for embeddings that do not look up their input, such as positions computed from a mask."""
        base = self.get_base_layer()
        return self.tap is not None or not (type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale"))

    def _with(self, names: list[str], *args: object, **kwargs: object) -> object:
        base: Any = self.get_base_layer()
        if self._swaps():
            sparse, base.sparse = base.sparse, False  # a sparse gradient does not pass through the weight's view
            try:
                return super()._with(names, *args, **kwargs)
            finally:
                base.sparse = sparse
        self._refuse_offloaded(names)
        y: Tensor = self.base_layer(*args, **kwargs)
        ids = cast(Tensor, args[0] if args else kwargs["input"])
        factor = getattr(base, "embed_scale", 1.0)  # Gemma's embedding scales what it looks up
        for name in names:
            core = self.core(name)
            found = nn.functional.embedding(ids, self.lorasb_A[name].t()).to(core.dtype)
            delta = found @ core.t() @ self.lorasb_B[name].to(core.dtype).t() * self.adapters[name].scaling
            y = y + (delta * factor).to(y.dtype)
        return y


def adapt_weights(module: nn.Module, adapter_name: str, **options: object) -> LoRASBWeight | None:
    """Return the module with adapters of its parameters; None if it is unsupported."""
    layer = module
    for unfolding in unfoldings(module):
        kind = LoRASBEmbedding if unfolding.kind == EMBEDDING else LoRASBWeight
        layer = kind(layer, adapter_name, unfolding, **options)
    return layer if isinstance(layer, LoRASBWeight) else None


class OpenParameters(_Wrapper):
    """A module with a `ParameterSlice` for each matrix of some 2-D or 3-D parameters, under the parameter's name."""

    def __init__(self, base_layer: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.open(names)

    @property
    def opened(self) -> tuple[str, ...]:
        """Names of the parameters that have slices."""
        return tuple(name for name in self._modules if name != "base_layer")

    def open(self, names: list[str]) -> None:
        """Open parameters of the module that are not open yet."""
        for name in [name for name in names if name not in self.opened]:
            parameter = self.base_layer.get_parameter(name)
            indices = range(len(parameter)) if parameter.dim() == 3 else [None]
            # not add_module: its `hasattr` check finds the wrapped module's attributes
            self._modules[name] = nn.ModuleList(ParameterSlice(self.base_layer, name, index) for index in indices)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The module's output with the adapters of its parameters."""
        with alone():
            weights = self._changed()
            given = (weights, args, kwargs)
            return functional_call(self.base_layer, *given) if weights else self.base_layer(*args, **kwargs)

    def _changed(self) -> dict[str, Tensor]:
        """Return the parameters whose matrices have active adapters, with these applied."""
        weights: dict[str, Tensor] = {}
        for name in self.opened:
            slices = self.slices(name)
            changed = [one.changed_weight() if isinstance(one, LoRASBWeight) else None for one in slices]
            if any(new is not None for new in changed):
                matrices = [one.weight if new is None else new for one, new in zip(slices, changed, strict=True)]
                is_whole = self.base_layer.get_parameter(name).dim() == 2
                weights[name] = matrices[0] if is_whole else torch.stack(matrices)
        return weights

    def slices(self, name: str) -> list[ParameterSlice | LoRASBWeight]:
        """The matrices of a parameter, with or without adapters."""
        return list(cast("Iterable[ParameterSlice | LoRASBWeight]", self._modules[name]))

    def adapted(self) -> list[LoRASBWeight]:
        """The matrices with adapters."""
        return [one for name in self.opened for one in self.slices(name) if isinstance(one, LoRASBWeight)]
