"""`LoRASBLinear`: a frozen linear layer with LoRA-SB adapters, in the form that PEFT expects of a tuner layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..checkpoints.shared_factors import missing
from ..constants import FACTORS
from ..functional import dequantize, lora_sb_linear
from ..quantization.quantized_weight import QuantizedWeight
from . import merging
from .base_weight import FrozenBase
from .offloading import brought_back
from .parameter_dicts import LOADED, Cores, FrozenFactors, placed_like
from .preconditioner import EquivalentGradient, Preconditioner
from .token_rows import Rows


class Group(Protocol):
    """Layers that read the same x and are computed in one call; `linear_group.Siblings` is one."""

    def take(self, layer: LoRASBLinear, x: Tensor) -> Tensor | None:
        """y of one member; None where it is to be computed alone."""


class LoRASBLinear(FrozenBase):
    """y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias, with W, A and B frozen and R trained (paper, Eq. 3 and 8).

    Where B and A are orthonormal, R's plain gradient is the one whose effect on W is closest to full fine-tuning
    (Theorem 3, Eq. 9). A layer starts with A = B = R = 0, which is the base layer; `lorasb.initialize` fills them.

    Args:
        base_layer: the frozen linear, `weight` [out, in] (or [in, out] with `fan_in_fan_out`); dense, or in 4 or 8 bits
            (bitsandbytes' `Linear4bit` and `Linear8bitLt`, or ours). A quantized base computes here, from its storage:
            on a CPU bitsandbytes' own forward would repack the weight.
        adapter_name: name of the first adapter.
        r: its rank.
        scaling: its s.
        lora_dropout: its probability of dropping an element of x on the adapter's path.
        equivalent_gradient: apply Theorem 3's closed form to R's gradient.
        fan_in_fan_out: the weight is stored transposed, as in `transformers.Conv1D`.
        octet_dtype: what an 8-bit base computes in, as its storage does not say; its bias's dtype, or fp16, if None.

    Forward: x [..., in] -> y [..., out], in x's dtype.

    Raises:
        RuntimeError: on a training forward of an adapter that has not been initialized.
    """

    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B", "r", "scaling", "lora_dropout", "equivalent", "initialized")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        scaling: float = 1.0,
        lora_dropout: float = 0.0,
        equivalent_gradient: bool = False,
        fan_in_fan_out: bool = False,
        octet_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base_layer, fan_in_fan_out, octet_dtype)
        self.lorasb_A, self.lorasb_R, self.lorasb_B = FrozenFactors(), Cores(), FrozenFactors()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.equivalent: dict[str, bool] = {}
        self.initialized: dict[str, bool] = {}
        self._preconditioners: dict[str, Preconditioner] = {}
        self.siblings: Group | None = None  # layers that read the same x, once they are known
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name
        self.add_adapter(adapter_name, r, scaling, lora_dropout, equivalent_gradient)

    def add_adapter(
        self,
        adapter_name: str,
        r: int,
        scaling: float = 1.0,
        lora_dropout: float = 0.0,
        equivalent_gradient: bool = False,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter of rank `r`: A [r, in] and B [out, r] in the base's dtype, R [r, r] in fp32, all zero.

        Raises:
            ValueError: r exceeds min(in_features, out_features), or an adapter of that name is there.
        """
        if not 0 < r <= min(self.in_features, self.out_features):
            raise ValueError(f"expected 0 < r <= min(in, out) = {min(self.in_features, self.out_features)}, got {r}")
        if adapter_name in self.lorasb_R:
            raise ValueError(f"this layer has an adapter {adapter_name!r} already: choose another adapter_name")
        device, dtype, core_dtype = self.execution_device, self.base_dtype, self.core_dtype
        self.r[adapter_name], self.scaling[adapter_name] = r, scaling
        self.lora_dropout[adapter_name], self.equivalent[adapter_name] = lora_dropout, equivalent_gradient
        self.initialized[adapter_name] = False
        self.lorasb_A[adapter_name] = nn.Parameter(torch.zeros(r, self.in_features, device=device, dtype=dtype))
        self.lorasb_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        self.lorasb_R[adapter_name] = nn.Parameter(torch.zeros(r, r, device=device, dtype=core_dtype))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def set_factors(self, adapter_name: str, b: Tensor, core: Tensor, a: Tensor) -> None:
        """Copy B [out, r], R [r, r] and A [r, in] into an adapter and mark it as initialized.

        Raises:
            ValueError: a shape does not fit.
        """
        targets = (self.lorasb_B[adapter_name], self.lorasb_R[adapter_name], self.lorasb_A[adapter_name])
        pairs = list(zip(targets, (b, core, a), strict=True))
        for target, value in pairs:
            if target.shape != value.shape:
                raise ValueError(f"expected a factor {list(target.shape)}, got {list(value.shape)}")
        for target, value in pairs:
            target.copy_(placed_like(target, value))
        self.initialized[adapter_name] = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out] for x [..., in]. Other arguments than `adapter_names` go to the base layer's own forward."""
        if "adapter_names" in kwargs:
            return self._by_rows(x, kwargs.pop("adapter_names"), *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.lorasb_R]
        if not names:
            return self.base_forward(x, *args, **kwargs)
        if args or kwargs or self.base_must_run():
            return self._beside_base(x, names, *args, **kwargs)
        return self._with_base(x, names)

    def _with_base(self, x: Tensor, names: list[str]) -> Tensor:
        """y with the base's product inside the first adapter's op."""
        quantized, dtype = self.quantized(), x.dtype
        y = self.siblings.take(self, x) if quantized is None and self.siblings is not None else None
        x = self.on_base_dtype(x, quantized)
        if y is None and quantized is None:
            y = self._adapted(x, names[0], self.dense_weight(), self.bias)
        elif y is None:  # each quantized layer multiplies its own panels: there is no group of them
            y = self._adapted(x, names[0], quantized, self.bias_like(x))
        for name in names[1:]:
            y = y + self._adapted(x, name)
        return y if y.dtype == dtype or torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def _beside_base(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """y where the base layer's module has to run by itself: its hooks, or arguments of its own."""
        y = self.base_forward(x, *args, **kwargs)
        for name in names:
            y = y + self._adapted(self.on_base_dtype(x), name).to(y.dtype)
        return y

    def _by_rows(self, x: Tensor, rows: Rows | Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """y, with the adapter that each row of x asks for."""
        rows = rows if isinstance(rows, Rows) else Rows.of(rows)
        if len(rows) != len(x):
            raise ValueError(f"expected adapter_names for each of {len(x)} rows, got {len(rows)}")
        if self.merged:
            raise ValueError("adapter_names need unmerged weights: call model.unmerge_adapter() first")
        y = self.base_forward(x, *args, **kwargs)
        for i, name in enumerate(rows.names):
            if self.disable_adapters or name not in self.lorasb_R:
                continue
            places = (rows.index == i).nonzero().flatten().to(x.device)
            if len(places) == len(x):
                y = y + self._adapted(self.on_base_dtype(x), name).to(y.dtype)
            elif len(places):
                part = self._adapted(self.on_base_dtype(x[places]), name)
                y = y.index_add(0, places, part.to(y.dtype))
        return y

    def _adapted(
        self, x: Tensor, name: str, weight: Tensor | QuantizedWeight | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The op over A, R and B of an adapter, with the base's weight or without."""
        modules: dict[str, Any] = self._modules  # their own look-ups take as long as the adapter of one token
        a, core, b = (modules[factor]._parameters[name] for factor in FACTORS)
        if a.is_meta and not x.is_meta:
            with brought_back([modules[factor] for factor in FACTORS], name) as (a, core, b):
                return lora_sb_linear(x, weight, a, core, b, bias, self.scaling[name])
        if not self.initialized[name] and getattr(core, LOADED, False) and not getattr(a, LOADED, False):
            raise missing()  # by a loader that reads one file and asks nobody
        scaling = self.scaling[name]
        if torch.is_grad_enabled() and core.requires_grad and not self.is_initialized(name):
            core = _refuse_to_train(core, name, self.training)
        if self.equivalent[name] and torch.is_grad_enabled() and self.is_initialized(name):  # zeros have no inverse
            core = EquivalentGradient.apply(core, *self.preconditioner(name))
        dropout = self.lora_dropout[name] if self.training else 0.0
        return lora_sb_linear(x, weight, a, core, b, bias, scaling, dropout=dropout)

    def preconditioner(self, name: str) -> tuple[Tensor, Tensor]:
        """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] of an adapter (Theorem 3), in R's dtype."""
        cached = self._preconditioners.setdefault(name, Preconditioner())
        a, b = self.lorasb_A[name], self.lorasb_B[name]
        return cached.matrices(a, b, self.scaling[name], self.lorasb_R[name].dtype)

    def is_initialized(self, name: str) -> bool:
        """Whether an adapter was initialized or loaded: a Python flag, or the one transformers' loader sets."""
        if self.initialized[name]:
            return True
        return all(getattr(getattr(self, factor)[name], LOADED, False) for factor in FACTORS)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's factors, by their names in a state dict."""
        r = self.r[name]
        return {"lorasb_A": (r, self.in_features), "lorasb_R": (r, r), "lorasb_B": (self.out_features, r)}

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B R A in R's dtype, in the layout of the base weight."""
        core = self.lorasb_R[adapter]
        b, a = self.lorasb_B[adapter].to(core.dtype), self.lorasb_A[adapter].to(core.dtype)
        delta = b @ core @ a * self.scaling[adapter]
        return delta.t() if self.fan_in_fan_out else delta

    def merged_weight(self, adapter_names: list[str], sign: float = 1.0) -> Tensor:
        """The base weight with the adapters' deltas added at their own precision; ValueError if it is not finite."""
        quantized = self.quantized()
        weight = self.base_weight().detach() if quantized is None else dequantize(quantized, self.base_dtype)
        return merging.merged(weight, [self.get_delta_weight(name) for name in adapter_names], adapter_names, sign)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add s·B R A to the base weight. A result that is not finite raises, with `safe_merge` and without.

        A quantized base gives way to a dense layer in the dtype that it computes in, and comes back with `unmerge`.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lorasb_R]
        if names:
            self.set_base_weight(self.merged_weight(names))
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtract what `merge` added, at the adapter's precision; a quantized base comes back as it was."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if not self.take_back():
            self.base_weight().data = self.merged_weight(self.merged_adapters, sign=-1.0)
        self.merged_adapters.clear()

    def settle_dtypes(self, adapter_name: str) -> None:
        """Put an adapter on the base's device, A and B in its dtype and frozen, R in fp32."""
        if adapter_name not in self.lorasb_R:
            return
        dtype = self.base_dtype
        for factors, wanted in ((self.lorasb_A, dtype), (self.lorasb_B, dtype), (self.lorasb_R, self.core_dtype)):
            old = factors[adapter_name]
            target = old.device if old.device.type == "meta" else self.execution_device
            if (old.dtype, old.device) != (wanted, target):
                new = nn.Parameter(old.detach().to(target, wanted), requires_grad=old.requires_grad)
                new.__dict__.update(old.__dict__)
                factors[adapter_name] = new

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook after loading; its own version would cast R to 16 bits and unfreeze A and B."""
        self.settle_dtypes(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self.lorasb_R:
            found = [(state_dict.get(f"{prefix}{part}.{name}"), getattr(self, part)[name]) for part in FACTORS]
            # torch fills what a file lacks (FSDP's: A and B) with the layer's own parameters: they were not loaded
            if all(value is not None and value is not own for value, own in found):
                self.initialized[name] = True

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every adapter is a plain LoRA: A and s·B·R."""
        return True

    def extra_repr(self) -> str:
        """Shapes and ranks, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling}"

    def __repr__(self) -> str:
        return "lorasb." + super().__repr__()


def _refuse_to_train(core: Tensor, name: str, training: bool) -> Tensor:
    """Raise in training mode; in evaluation mode give R a hook which raises if a backward comes all the same."""
    error = RuntimeError(
        f"adapter {name!r} has not been initialized: its A, B and R are zero and would learn nothing. "
        "Call lorasb.initialize(model, dataloader, lr=...) before training, or load a saved adapter"
    )
    if training:
        raise error

    def refuse(_: Tensor) -> None:
        raise error

    core = core.view_as(core)
    core.register_hook(refuse)
    return core
