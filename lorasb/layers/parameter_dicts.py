"""Parameter dicts for A, B and R by adapter name, which enforce that A and B are frozen and R is fp32 or wider.

PEFT, transformers' loader and `load_state_dict(assign=True)` assign parameters of their own, trainable ones for A and
B and 16-bit ones for R. All of them arrive at `__setattr__`: `nn.ParameterDict.__setitem__` calls setattr as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..compat.transformers import is_loaded, mark_loaded
from ..utils.precision import SIXTEEN_BIT


class FrozenFactors(nn.ParameterDict):
    """A or B by adapter name, never requiring gradients."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            value.requires_grad_(False)
        super().__setattr__(name, value)


class Cores(nn.ParameterDict):
    """R by adapter name, not in 16 bits, where small updates would round to nothing, unless that was asked for.

    Attributes:
        stored_16bit: names of adapters whose R may have 16 bits: PEFT's `autocast_adapter_dtype=False`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored_16bit: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.dtype in SIXTEEN_BIT and name not in self.stored_16bit:
            loaded = is_loaded(value)  # the new parameter has to carry the mark
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
            if loaded:
                mark_loaded(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Cores:
        """Move R; of a cast to 16 bits (`model.to(torch.bfloat16)`) only the change of device is applied."""

        # `_apply` may set `parameter.data` in place, which does not pass through `__setattr__`.
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            new: torch.Tensor = fn(tensor)
            return tensor.to(new.device) if new.dtype in SIXTEEN_BIT else new

        super()._apply(move_only, recurse)
        return self


def shard_like(target: Any, value: torch.Tensor) -> torch.Tensor:
    """A full tensor sharded like the target, if that is a DTensor of FSDP2; else the tensor itself."""
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every rank has the same full tensor and takes its own shard, without communication.
    value = value.to(target.device, target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


class Bases:
    """The part of `LoRASBLinear` that knows which adapters share factors, and with which."""

    basis: dict[str, str]  # of adapters that have another one's A and B: its name
    stored_cores: Any
    lorasb_A: Any  # noqa: N815  as PEFT names factors
    lorasb_B: Any  # noqa: N815
    lorasb_R: Any  # noqa: N815
    r: dict[str, int]
    scaling: dict[str, float]
    first_scaling: dict[str, float]
    other_param_names: tuple[str, ...]
    _preconditioners: dict[str, Any]
    initialized: dict[str, bool]
    wide_factors: dict[str, bool]

    def stand_on(self, adapter_name: str, basis: str) -> None:
        """Give an adapter the A and B of another one."""
        self.basis[adapter_name], self.initialized[adapter_name] = basis, self.is_initialized(basis)
        self.wide_factors[adapter_name] = self.wide_factors[basis]
        for factors in (self.lorasb_A, self.lorasb_B):
            factors[adapter_name] = factors[basis]

    def copy_adapter(self, adapter_name: str, name: str) -> None:
        """Add an adapter like another one on a basis: the same A and B, and a copy of R, which does not train yet."""
        tables = [getattr(self, table) for table in self.other_param_names]  # A, B and all but R, by adapter
        try:
            for values in tables:
                if adapter_name in values:
                    values[name] = values[adapter_name]
            if adapter_name in self.lorasb_R.stored_16bit:
                self.lorasb_R.stored_16bit.add(name)
            self.lorasb_R[name] = nn.Parameter(self.lorasb_R[adapter_name].detach().clone(), requires_grad=False)
        except BaseException:  # Ctrl-C, too
            self.lorasb_R.stored_16bit.discard(name)
            for values in (*tables, self.lorasb_R):
                with suppress(KeyError, AttributeError):  # a ParameterDict may have the key, and no parameter yet
                    del values[name]
            raise

    def move_to_basis(self, adapter_name: str, basis: str, core: Tensor) -> None:
        """Give an adapter the A, B, rank and s of another one, and an R [r, r]; dropout and all else stays."""
        old = self.lorasb_R[adapter_name]
        self.stand_on(adapter_name, basis)
        self.r[adapter_name] = self.r[basis]
        self.scaling[adapter_name] = self.first_scaling[adapter_name] = self.scaling[basis]
        self._preconditioners.pop(adapter_name, None)
        new = core.to(old.device, self.lorasb_R[basis].dtype)
        self.lorasb_R[adapter_name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def leave_basis(self, adapter_name: str) -> None:
        """Give an adapter that shares another one's factors copies of these A and B."""
        if self.basis.pop(adapter_name, None) is not None:
            for factors in (self.lorasb_A, self.lorasb_B):
                factors[adapter_name] = nn.Parameter(factors[adapter_name].detach().clone(), requires_grad=False)

    def share_again(self, adapter_name: str) -> None:
        """Undo what a loader or a change of dtype does, which replaces shared tensors by separate ones."""
        for name, basis in self.basis.items():
            if adapter_name in (name, basis) and self.lorasb_A[name] is not self.lorasb_A[basis]:
                self.stand_on(name, basis)

    def serves_bank(self, adapter_name: str) -> bool:
        """True if a bank's adapters have this one's A and B."""
        return self.stored_cores is not None and bool(self.stored_cores.basis == adapter_name)

    def is_initialized(self, name: str) -> bool:
        """True if an adapter was initialized, or loaded from one that was."""
        raise NotImplementedError


class EquivalentGradient(torch.autograd.Function):
    """The identity on R, whose backward maps g to left·g·right (all [r, r])."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return left @ grad @ right, None, None


class Preconditioner:
    """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] of Theorem 3, cached until A, B or s changes."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._matrices: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def matrices(self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] in `dtype`, for A [r, in] and B [out, r].

        Computed in fp64, as forming the Gram matrix squares the factors' condition number.
        """
        # Pointers show that a parameter was replaced or moved, versions that it was written to in place.
        key = (a.data_ptr(), a._version, b.data_ptr(), b._version, scaling)
        if self._matrices is None or self._key != key:
            wide_a, wide_b = a.double(), b.double()
            left = torch.linalg.inv(wide_b.t() @ wide_b) / scaling**2
            right = torch.linalg.inv(wide_a @ wide_a.t())
            self._key, self._matrices = key, (left.to(dtype), right.to(dtype))
        return self._matrices


def has_values(a: Tensor) -> bool:
    """False for the zeros of an adapter that was saved before it was initialized."""
    a = a.detach()
    a = a.to_local() if hasattr(a, "to_local") else a  # a DTensor's own shard
    return a.is_meta or a.numel() == 0 or bool(a.any())


def guarded_core(layer: Any, name: str) -> Tensor:
    """R of an adapter for a forward, with the gradient that it is to get (Theorem 3, if `equivalent_gradient`).

    Args:
        layer: a `LoRASBLinear`, which imports this module.
        name: of the adapter.

    Raises:
        RuntimeError: the adapter would be trained before it is initialized.
    """
    core: Tensor = layer._modules["lorasb_R"]._parameters[name]
    if core.dtype in SIXTEEN_BIT:  # as asked: products take fp32 or wider, and the gradient is rounded to R's dtype
        core = core.float()
    if not torch.is_grad_enabled():
        return core
    initialized = layer.is_initialized(name)
    if core.requires_grad and not initialized:
        core = _guard_uninitialized(core, name, layer.training)
    # Not before initialization: A and B are zero then, and AAᵀ and BᵀB singular.
    return (
        EquivalentGradient.apply(core, *layer.preconditioner(name)) if layer.equivalent[name] and initialized else core
    )


def _guard_uninitialized(core: Tensor, name: str, training: bool) -> Tensor:
    """Raise in training mode; in evaluation mode return a view of R whose gradient hook raises.

    Evaluating an uninitialized adapter is legitimate and gives the base's result, with gradients enabled or not.
    """
    error = RuntimeError(
        f"adapter {name!r} has not been initialized: its A, B and R are zero and would learn nothing. "
        "Call lorasb.initialize(model, dataloader, lr=...) before training, or load a saved adapter"
    )
    if training:
        raise error

    def raise_error(_: Tensor) -> None:
        raise error

    core = core.view_as(core)  # a hook on the parameter itself would outlive this forward and collect with each one
    core.register_hook(raise_error)
    return core


def delta_weight(a: Tensor, core: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s·B R A [out, in] in R's dtype, in fp32 at least.

    A and B are widened, as a product in 16 bits would round the delta before it is added to the weight.
    """
    core = core.float() if core.dtype in SIXTEEN_BIT else core
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # a forward under it may unmerge
        return b.to(core.dtype) @ core @ a.to(core.dtype) * scaling


def merged(weight: Tensor, deltas: Sequence[Tensor], names: Sequence[str], sign: float = 1.0) -> Tensor:
    """W + sign·Σ deltas, summed in the deltas' dtype and returned in W's.

    Args:
        weight: W in its stored layout, [out, in] or [in, out].
        deltas: s·B R A of each adapter, in the same layout, fp32 or wider.
        names: of the adapters, for the error message.
        sign: 1 to merge, -1 to unmerge.

    Raises:
        ValueError: the result is not finite.
    """
    total = weight
    for delta in deltas:
        total = total + sign * delta  # type promotion widens a 16-bit W to the delta's fp32
    result = total.to(weight.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {' and '.join(names)} seems to be broken: merging gives "
            f"weights that are not finite in {weight.dtype}; the weights were left as they are. Check the adapter's "
            "training, or merge into a wider dtype"
        )
    return result


class Scales(BaseTunerLayer):
    """A tuner layer with a scaling s by adapter name, and the one that each adapter was made with."""

    scaling: dict[str, float]
    first_scaling: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's s to `scale` times the one that it was made with; others' names are passed over."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.first_scaling[adapter]

    def set_scale_as_made(self, adapter: str, scaling: float) -> None:
        """Set an adapter's s, as if it had been made with it."""
        self.scaling[adapter] = self.first_scaling[adapter] = scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the s of every active adapter."""
        for name in self._active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the s of every active adapter; None puts back the one that it was made with."""
        for name in self._active_here():
            self.scaling[name] = self.first_scaling[name] if scale is None else self.scaling[name] / scale

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]
