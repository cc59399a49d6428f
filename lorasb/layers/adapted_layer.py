"""`AdaptedLayer`: a frozen layer with named adapters: their A, R and B, states, bases, scales and dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..compat.transformers import is_loaded
from ..config.adapter import AdapterOptions
from ..constants import FACTORS
from ..utils.precision import SIXTEEN_BIT, double
from .adapter_state import (
    AdapterState,
    Cores,
    EquivalentGradient,
    FrozenFactors,
    Rows,
    Scales,
    check_name,
    has_values,
    length_mismatch,
    refuse_training,
)
from .base import Base
from .opaque_base import make_base


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A frozen layer with adapters by name: A and B frozen, R trained. Takes the arguments of `LoRASBLinear`."""

    # PEFT sets requires_grad on everything in `adapter_layer_names`: only R is listed, as A and B stay frozen.
    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B", "adapters")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        scaling: float = 1.0,
        lora_dropout: float = 0.0,
        equivalent_gradient: bool = False,
        wide_factors: bool = False,
        fan_in_fan_out: bool = False,
        octet_dtype: torch.dtype | None = None,
        resolver_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # a new module would be in training mode inside a model in eval mode
        self._base_options = fan_in_fan_out, octet_dtype, resolver_options
        self.base = self._make_base(base_layer)
        self.out_features, self.in_features = self.base.shape
        self.lorasb_A, self.lorasb_R, self.lorasb_B = FrozenFactors(), Cores(), FrozenFactors()
        self.adapters: dict[str, AdapterState] = {}  # state by adapter name
        # set by a bank, whose adapters have the A and B of `basis`; `stack(device)` returns their R's [capacity, r, r]
        self.stored_cores: Any = None
        # when adapters were disabled: the active ones, and those whose R required a gradient
        self._before_disabling: tuple[list[str], list[str]] = [], []
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name
        self.add_adapter(adapter_name, r, scaling, lora_dropout, equivalent_gradient, wide_factors)

    def _make_base(self, module: nn.Module) -> Base:
        return make_base(module, *self._base_options)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        super().__setattr__(name, value)
        if name == "base_layer" and "base" in self.__dict__ and value is not self.base.module:
            self._use(self._make_base(cast(nn.Module, value)))

    @property
    def cast_input_dtype_enabled(self) -> bool:
        """True if x is cast to the base's dtype, as in PEFT's layers."""
        return self.base.casts

    @cast_input_dtype_enabled.setter
    def cast_input_dtype_enabled(self, enabled: bool) -> None:
        self.base.casts = enabled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        """Move or cast the layer, and A and B with their base; reread a quantized base."""
        super()._apply(fn, recurse)
        self.base.moved()
        self._follow_base()
        return self

    def _follow_base(self) -> None:
        """Cast A and B like their base; R stays the same parameter object, because optimizers hold it."""
        for name in self.adapters:
            self.cast_factors(name, frozen_alone=True)

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "LoRA-SB layers do not run in nn.DataParallel, which Trainer uses when a process sees several GPUs: start "
            "one process per GPU (torchrun), or set CUDA_VISIBLE_DEVICES=0"
        )

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        scaling: float = 1.0,
        lora_dropout: float = 0.0,
        equivalent_gradient: bool = False,
        wide_factors: bool = False,
        basis: str | None = None,
        start_at: str | None = None,
    ) -> None:
        """Add an adapter of rank `r`: A [r, in] and B [out, r] in the base's dtype, R [r, r] in fp32, all zero."""
        # With `wide_factors` A and B are in fp32, too, and the adapter computes in fp32, but not the base. With `basis`
        # A and B are another adapter's tensors, and R starts at zero or at a copy of the R of the adapter `start_at`.
        if not 0 < r <= min(self.in_features, self.out_features):
            raise ValueError(f"expected 0 < r <= min(in, out) = {min(self.in_features, self.out_features)}, got {r}")
        check_name(adapter_name)
        if adapter_name in self.lorasb_R:
            raise ValueError(f"this layer has an adapter {adapter_name!r} already: choose another adapter_name")
        options = AdapterOptions(lora_dropout, equivalent_gradient, wide_factors).options()
        self.adapters[adapter_name] = AdapterState(r=r, scaling=scaling, made_with=scaling, **options)
        device, dtype, core_dtype = self.base.device, self.factor_dtype_of(adapter_name), self.core_dtype
        self.lorasb_A[adapter_name] = nn.Parameter(torch.zeros(r, self.in_features, device=device, dtype=dtype))
        self.lorasb_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        self.lorasb_R[adapter_name] = nn.Parameter(torch.zeros(r, r, device=device, dtype=core_dtype))
        if basis is not None:
            self.share_factors_of(adapter_name, basis)
        if start_at is not None:
            self.lorasb_R[adapter_name].data.copy_(self.lorasb_R[start_at].detach())
        # The new R requires gradients only if its adapter is active.
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def set_factors(self, adapter_name: str, b: Tensor, core: Tensor, a: Tensor) -> None:
        """Copy B [out, r], R [r, r] and A [r, in] into an adapter and mark it as initialized."""
        targets = (self.lorasb_B[adapter_name], self.lorasb_R[adapter_name], self.lorasb_A[adapter_name])
        pairs = list(zip(targets, (b, core, a), strict=True))
        for target, value in pairs:  # all shapes before the first copy, so that an error leaves the adapter unchanged
            if target.shape != value.shape:
                raise ValueError(f"expected a factor {list(target.shape)}, got {list(value.shape)}")
        for target, value in pairs:
            if hasattr(target, "device_mesh"):  # a DTensor of FSDP2
                from torch.distributed.tensor import distribute_tensor

                # src_data_rank=None: every rank has the same full tensor and takes its own shard, without communication
                value = value.to(target.device, target.dtype)
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(value)
        self.adapters[adapter_name].initialized = True

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable adapters as PEFT does; enabling them resumes joint training."""
        if not enabled and not self._disable_adapters:
            trained = [name for name, core in self.lorasb_R.items() if core.requires_grad]
            self._before_disabling = list(self.active_adapters), trained
        super().enable_adapters(enabled)
        if enabled and self._before_disabling[0] == self.active_adapters:  # if others are active now, they train alone
            self.set_requires_grad(self._before_disabling[1])

    def share_factors_of(self, adapter_name: str, basis: str) -> None:
        """Give an adapter the A and B of another one."""
        state = self.adapters[adapter_name]
        state.basis, state.initialized = basis, self.is_initialized(basis)
        state.wide_factors = self.adapters[basis].wide_factors
        for factors in (self.lorasb_A, self.lorasb_B):
            factors[adapter_name] = factors[basis]

    def copy_adapter(self, adapter_name: str, name: str) -> None:
        """Copy an adapter that has a basis: the same A and B, and a copy of R that does not train yet."""
        try:
            self.adapters[name] = replace(self.adapters[adapter_name], preconditioner=None)
            self.share_factors_of(name, cast(str, self.adapters[name].basis))
            if adapter_name in self.lorasb_R.stored_16bit:
                self.lorasb_R.stored_16bit.add(name)
            self.lorasb_R[name] = nn.Parameter(self.lorasb_R[adapter_name].detach().clone(), requires_grad=False)
        except BaseException:  # Ctrl-C, too
            self.lorasb_R.stored_16bit.discard(name)
            for values in (self.adapters, self.lorasb_A, self.lorasb_B, self.lorasb_R):
                with suppress(KeyError, AttributeError):  # a ParameterDict may have the key but no parameter yet
                    del values[name]
            raise

    def move_to_basis(self, adapter_name: str, basis: str, core: Tensor) -> None:
        """Give an adapter the A, B, rank and s of another one, and a new R [r, r]; other settings stay."""
        old, state, other = self.lorasb_R[adapter_name], self.adapters[adapter_name], self.adapters[basis]
        self.share_factors_of(adapter_name, basis)
        state.r, state.scaling, state.made_with = other.r, other.made_with, other.made_with
        new = core.to(old.device, self.lorasb_R[basis].dtype)
        self.lorasb_R[adapter_name] = nn.Parameter(new, requires_grad=old.requires_grad)

    def leave_basis(self, adapter_name: str) -> None:
        """Give an adapter that shares another one's A and B its own copies of them."""
        state = self.adapters[adapter_name]
        if state.basis is not None:
            state.basis = None
            for factors in (self.lorasb_A, self.lorasb_B):
                factors[adapter_name] = nn.Parameter(factors[adapter_name].detach().clone(), requires_grad=False)

    @property
    def bases(self) -> dict[str, str]:
        """Each adapter that uses another one's A and B, mapped to that one."""
        return {name: state.basis for name, state in self.adapters.items() if state.basis is not None}

    def serves_bank(self, adapter_name: str) -> bool:
        """True if a bank's adapters use this one's A and B."""
        return self.stored_cores is not None and bool(self.stored_cores.basis == adapter_name)

    def core(self, name: str) -> Tensor:
        """Return an adapter's R for a forward; `equivalent_gradient` changes its gradient (Theorem 3)."""
        core: Tensor = cast(Any, self._modules["lorasb_R"])._parameters[name]
        if core.dtype in SIXTEEN_BIT:  # products take fp32 or wider, and the gradient is rounded to R's dtype
            core = core.float()
        if not torch.is_grad_enabled():
            return core
        if not self.is_initialized(name):  # A and B are zero, and AAᵀ and BᵀB singular
            return refuse_training(core, name, self.training) if core.requires_grad else core
        if self.adapters[name].equivalent_gradient:
            core = EquivalentGradient.apply(core, *self.preconditioner(name))
        return core

    @torch.no_grad()
    def preconditioner(self, name: str) -> tuple[Tensor, Tensor]:
        """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] of an adapter (Theorem 3), in R's dtype; cached until A, B or s changes."""
        state, a, b, dtype = self.adapters[name], self.lorasb_A[name], self.lorasb_B[name], self.lorasb_R[name].dtype
        # The pointer changes if a parameter is replaced or moved, the version if it is written in place.
        key = (a.data_ptr(), a._version, b.data_ptr(), b._version, state.scaling)
        if state.preconditioner is None or state.preconditioner[0] != key:
            wide_a, wide_b = double(a), double(b)  # a Gram matrix squares the factors' condition number
            left = torch.linalg.inv(wide_b.t() @ wide_b) / state.scaling**2
            right = torch.linalg.inv(wide_a @ wide_a.t())
            state.preconditioner = key, left.to(a.device, dtype), right.to(a.device, dtype)
        return state.preconditioner[1:]

    def is_initialized(self, name: str) -> bool:
        """True if an adapter was initialized, or loaded from one that was."""
        state = self.adapters[name]
        # transformers' loader bypasses `_load_from_state_dict`, and marks each parameter that it loaded.
        if not state.initialized and all(is_loaded(getattr(self, f)[name]) for f in FACTORS):
            state.initialized = has_values(self.lorasb_A[name])
        return state.initialized

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's factors, keyed by their names in a state dict."""
        r = self.adapters[name].r
        return {"lorasb_A": (r, self.in_features), "lorasb_R": (r, r), "lorasb_B": (self.out_features, r)}

    def cast_factors(self, adapter_name: str, wide_core: bool | None = None, frozen_alone: bool = False) -> None:
        """Move an adapter, or only A and B, to the base's device, in the configured dtypes."""
        if adapter_name not in self.lorasb_R:
            return
        if wide_core is not None:
            (self.lorasb_R.stored_16bit.discard if wide_core else self.lorasb_R.stored_16bit.add)(adapter_name)
        narrow = adapter_name in self.lorasb_R.stored_16bit
        frozen, core = self.factor_dtype_of(adapter_name), self.base.dtype if narrow else self.core_dtype
        cores = [] if frozen_alone else [(self.lorasb_R, core)]
        for factors, dtype in [(self.lorasb_A, frozen), (self.lorasb_B, frozen), *cores]:
            old = factors[adapter_name]
            device = old.device if old.device.type == "meta" else self.base.device
            if (old.dtype, old.device) != (dtype, device):
                new = nn.Parameter(old.detach().to(device, dtype), requires_grad=old.requires_grad)
                new.__dict__.update(old.__dict__)  # attributes set from outside, such as transformers' loaded flag
                factors[adapter_name] = new
        # A loader or a change of dtype replaces shared tensors with separate ones.
        for name, basis in self.bases.items():
            if adapter_name in (name, basis) and self.lorasb_A[name] is not self.lorasb_A[basis]:
                self.share_factors_of(name, basis)

    @property
    def core_dtype(self) -> torch.dtype:
        """The dtype of R: fp32 for a 16-bit base, as 16 bits would round small updates away, else the base's."""
        dtype = self.base.dtype
        return torch.float32 if dtype in SIXTEEN_BIT else dtype

    def factor_dtype_of(self, adapter_name: str) -> torch.dtype:
        """The dtype of an adapter's A and B: the base's, or fp32 (`wide_factors`)."""
        return self.core_dtype if self.adapters[adapter_name].wide_factors else self.base.dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after loading; its own version would cast R to 16 bits and unfreeze A and B."""
        self.cast_factors(adapter_name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self.lorasb_R:
            loaded = {factor: state_dict.get(f"{prefix}{factor}.{name}") for factor in FACTORS}
            # torch fills in keys that a checkpoint lacks (with FSDP: A and B) with the layer's own parameters. Only a
            # tensor that is another object came from the checkpoint.
            if not any(tensor is None or tensor is getattr(self, factor)[name] for factor, tensor in loaded.items()):
                self.adapters[name].initialized = has_values(cast(Tensor, loaded["lorasb_A"]))

    @property
    def r(self) -> Mapping[str, int]:
        """Ranks by adapter name."""
        return MappingProxyType({name: state.r for name, state in self.adapters.items()})

    @property
    def scaling(self) -> dict[str, float]:
        """The scale s of each adapter, by name."""
        return Scales(self.adapters, self.refuse_merged)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's s to `scale` times its original s; names that this layer lacks are ignored."""
        self.refuse_merged(adapter)
        if adapter in self.adapters:
            self.adapters[adapter].scaling = scale * self.adapters[adapter].made_with

    def scale_layer(self, scale: float) -> None:
        """Multiply the s of every active adapter."""
        self.refuse_merged(*self.active_here())
        for name in self.active_here():
            self.adapters[name].scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the s of every active adapter; None restores its original s."""
        self.refuse_merged(*self.active_here())
        for name in self.active_here():
            state = self.adapters[name]
            state.scaling = state.made_with if scale is None else state.scaling / scale

    def refuse_merged(self, *adapters: str) -> None:
        """Raise a ValueError if one is merged: unmerging would subtract another update than was added."""
        for name in self.merged_adapters:
            if name in adapters:
                raise ValueError(f"adapter {name!r} is merged into the weights: call model.unmerge_adapter() first")

    def active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.adapters]

    def checked_rows(self, x: Tensor, names: Rows | Sequence[str]) -> Rows:
        """Return the adapter of each row of x; raise a ValueError if their numbers differ or adapters are merged."""
        rows = names if isinstance(names, Rows) else Rows.of(names)
        if rows.index.shape[0] != x.shape[0]:
            raise ValueError(length_mismatch(x.shape[0], len(rows)))
        if self.merged:
            raise ValueError(  # PEFT's wording, which programs match, and the fix
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first: "
                "model.unmerge_adapter()"
            )
        return rows

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B R A in R's dtype, at least fp32, in the layout of the base's weight: [out, in], or transposed."""
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # a forward may unmerge
            return self._delta(adapter)

    def _delta(self, name: str) -> Tensor:
        """Return s·B R A, differentiable with respect to R."""
        # A and B are widened, as a product in 16 bits would round the delta before it is added to the weight.
        core = self.core(name)
        b, a = self.lorasb_B[name].to(core.dtype), self.lorasb_A[name].to(core.dtype)
        return self.base.folded(b @ core @ a * self.adapters[name].scaling)

    def merged_weight(self, adapter_names: list[str], sign: float = 1.0) -> Tensor:
        """The base weight plus sign times the adapters' deltas, summed in R's dtype.

        Raises:
            ValueError: the result is not finite, or the base layer's W cannot be read, or the layer computes it itself.
        """
        self.base.refuse_computed_weight()
        weight = self.base.merging_weight().detach()
        total = weight
        for name in adapter_names:
            total = total + sign * self.get_delta_weight(name)  # type promotion widens a 16-bit W to the delta's fp32
        result = total.to(weight.dtype)
        if not torch.isfinite(result).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {' and '.join(adapter_names)} seems to be broken: "
                f"merging gives weights that are not finite in {weight.dtype}; the weights were left as they are. "
                "Check the adapter's training, or merge into a wider dtype"
            )
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add s·B R A to the base weight.

        A quantized or opaque base layer is replaced by a dense one in its compute dtype, until `unmerge`.

        Raises:
            ValueError: the result is not finite (with or without `safe_merge`), or the base layer's W cannot be read.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lorasb_R]
        if names:
            self._use(self.base.merged(self.merged_weight(names)))
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtract the merged deltas, summed in R's dtype; a quantized base is restored bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._use(self.base.restored() or self.base.merged(self.merged_weight(self.merged_adapters, sign=-1.0)))
        self.merged_adapters.clear()

    def _use(self, base: Base) -> None:
        """Switch to another base and its module, and keep the current base's settings."""
        base.trains_bias, base.casts = self.base.trains_bias, self.base.casts
        self.base = base
        if base.module is not self.base_layer:
            self.base_layer = base.module
        self._follow_base()  # a merged base may have been cast meanwhile

    def as_matrix(self, weight: Tensor) -> Tensor:
        """View a tensor in the base weight's layout as W [out, in]."""
        return self.base.matrix(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True for every adapter: it equals a plain LoRA with factors A and s·B·R."""
        return True

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling}"

    def __repr__(self) -> str:
        return "lorasb." + super().__repr__()
