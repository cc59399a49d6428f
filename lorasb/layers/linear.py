"""`LoRASBLinear`: a frozen linear layer with LoRA-SB adapters, in the form that PEFT expects of a tuner layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..checkpoints.shared_factors import missing
from ..constants import FACTORS
from ..functional import dequantize, lora_sb_linear, quantized_linear
from ..quantization.bitsandbytes import keep_unpacked
from ..quantization.quantized_weight import QuantizedWeight, compute_dtype, is_quantized, of_module
from ..utils.deprecation import renamed_method
from . import merging
from .equivalent_gradient import EquivalentGradient, preconditioners
from .offloading import brought_back
from .parameter_dicts import HALVES, LOADED, Cores, FrozenFactors, placed_like
from .token_rows import Rows

if TYPE_CHECKING:
    from .linear_group import Siblings


class LoRASBLinear(nn.Module, BaseTunerLayer):
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
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.fan_in_fan_out = fan_in_fan_out
        self.octet_dtype = octet_dtype
        self._read: tuple[Any, int, int, QuantizedWeight] | None = None
        self._packed_base: list[nn.Module] = []  # the quantized layer while a merged, dense one stands there
        keep_unpacked(base_layer)
        found = self.quantized()
        out_features, in_features = found.shape if found is not None else self.dense_weight().shape
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.lorasb_A, self.lorasb_R, self.lorasb_B = FrozenFactors(), Cores(), FrozenFactors()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.equivalent: dict[str, bool] = {}
        self.initialized: dict[str, bool] = {}
        self._preconditioners: dict[str, tuple[Any, Tensor, Tensor]] = {}
        self.siblings: Siblings | None = None  # layers that read the same x, once they are known
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
        device, dtype, core_dtype = self._device(), self.base_dtype, self._core_dtype()
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
        for target, value in zip(targets, (b, core, a), strict=True):
            if target.shape != value.shape:
                raise ValueError(f"expected a factor {list(target.shape)}, got {list(value.shape)}")
        for target, value in zip(targets, (b, core, a), strict=True):
            target.copy_(placed_like(target, value))
        self.initialized[adapter_name] = True

    def quantized(self) -> QuantizedWeight | None:
        """What the base layer stores, if it is quantized; read once, and again when it was replaced or written to."""
        base = self._modules["base_layer"]  # nn.Module's own way there takes longer than a small product
        if base is None or type(base) is nn.Linear or not is_quantized(base):
            return None
        read, weight = self._read, base._parameters["weight"]
        if read is not None and torch.compiler.is_compiling():  # `_apply` keeps it up to date; a graph has no pointers
            return read[3]
        if read is not None and read[0] is weight and read[1] == weight._version and read[2] == weight.data_ptr():
            return read[3]
        found = of_module(base)
        if found is not None:
            self._read = weight, weight._version, weight.data_ptr(), found  # type: ignore[union-attr]
        return found

    quantised = renamed_method("quantised", "quantized")

    def _apply(self, fn: Any, recurse: bool = True) -> LoRASBLinear:
        """Moves and casts: what was read of a quantized base is read again."""
        super()._apply(fn, recurse)
        if self._read is not None and not self.base_layer.weight.is_meta:
            self._read = None
            self.quantized()
        return self

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base computes in, which A and B have too."""
        return self._dtype_of(self.quantized())

    def _dtype_of(self, found: QuantizedWeight | None) -> torch.dtype:
        if found is None:
            dtype: torch.dtype = self.weight.dtype
            return dtype
        if found.kind == "int8" and self.octet_dtype is not None:
            return self.octet_dtype
        return compute_dtype(self.base_layer, found)

    def dense_weight(self) -> Tensor:
        """W [out, in]: the base layer's weight, or a view of it; of a quantized one, what its bits stand for."""
        found = self.quantized()
        if found is not None:
            return dequantize(found)
        weight = self.base_weight()
        return weight.t() if self.fan_in_fan_out else weight

    def base_weight(self) -> Tensor:
        """The base layer's weight as it is stored."""
        return cast(Tensor, self.get_base_layer().weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out] for x [..., in]."""
        if "adapter_names" in kwargs:
            return self._by_rows(x, kwargs.pop("adapter_names"), *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if n in self.lorasb_R]
        if not names or args or kwargs or self.base_must_run():
            whole = self._base(x, *args, **kwargs)
            for name in names:
                whole = whole + self._adapted(self.on_base_dtype(x), name, None, None).to(whole.dtype)
            return whole
        found = self.quantized()  # each of these multiplies its own panels
        y = self.siblings.take(self, x) if found is None and self.siblings is not None else None
        dtype, x = x.dtype, self.on_base_dtype(x, found)
        if y is None and found is None:
            y = self._adapted(x, names[0], self.dense_weight(), self.bias)
        elif y is None:
            y = self._adapted(x, names[0], found, self._bias_like(x))
        for name in names[1:]:
            y = y + self._adapted(x, name, None, None)
        return y if y.dtype == dtype or torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own result. A quantized one is computed from its storage, without its module's forward."""
        found = None if args or kwargs or self.base_must_run() else self.quantized()
        dtype, y = x.dtype, x
        if found is not None or self._packed_base:  # or a merged dense layer, in the dtype that the former computed in
            x = self.on_base_dtype(x, found)
        if found is None:
            y = self.base_layer(x, *args, **kwargs)
            if not self._packed_base:
                return y
        else:
            y = quantized_linear(x, found, self._bias_like(x))
        return y if torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def _by_rows(self, x: Tensor, rows: Rows | Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """y, with the adapter that each row of x asks for."""
        rows = rows if isinstance(rows, Rows) else Rows.of(rows)
        if len(rows) != len(x):
            raise ValueError(f"expected adapter_names for each of {len(x)} rows, got {len(rows)}")
        if self.merged:
            raise ValueError("adapter_names need unmerged weights: call model.unmerge_adapter() first")
        y = self._base(x, *args, **kwargs)
        for i, name in enumerate(rows.names):
            if self.disable_adapters or name not in self.lorasb_R:
                continue
            places = (rows.index == i).nonzero().flatten().to(x.device)
            if len(places) == len(x):
                y = y + self._adapted(self.on_base_dtype(x), name, None, None).to(y.dtype)
            elif len(places):
                part = self._adapted(self.on_base_dtype(x[places]), name, None, None)
                y = y.index_add(0, places, part.to(y.dtype))
        return y

    def _bias_like(self, x: Tensor) -> Tensor | None:
        """The bias in x's dtype: a quantized layer's own may be in another."""
        bias = cast("Tensor | None", self.base_layer.bias)
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def _adapted(self, x: Tensor, name: str, weight: Tensor | QuantizedWeight | None, bias: Tensor | None) -> Tensor:
        held: dict[str, Any] = self._modules  # their own look-ups take as long as the adapter of one token
        a, core, b = (held[factor]._parameters[name] for factor in FACTORS)
        if a.is_meta and not x.is_meta:
            with brought_back([held[factor] for factor in FACTORS], name) as (a, core, b):
                return lora_sb_linear(x, weight, a, core, b, bias, self.scaling[name])
        s = self.scaling[name]
        if not self.initialized[name] and getattr(core, LOADED, False) and not getattr(a, LOADED, False):
            raise missing()  # by a loader that reads one file and asks nobody
        if torch.is_grad_enabled() and core.requires_grad and not self.is_initialized(name):
            core = self._refuse_to_train(core, name)
        if self.equivalent[name] and torch.is_grad_enabled() and self.is_initialized(name):  # zeros have no inverse
            core = EquivalentGradient.apply(core, *preconditioners(self, name))
        dropout = self.lora_dropout[name] if self.training else 0.0
        return lora_sb_linear(x, weight, a, core, b, bias, s, dropout=dropout)

    def base_must_run(self) -> bool:
        """Whether reading the weight would bypass something: offloading or sharding hooks, or another forward."""
        base = self.base_layer
        plain = type(base).forward is nn.Linear.forward or self.fan_in_fan_out or is_quantized(base)
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            not plain
            or bool(hooked)
            or "forward" in vars(base)
            or "_hf_hook" in vars(base)
            or hasattr(base._parameters.get("weight"), "ds_id")
        )

    def on_base_dtype(self, x: Tensor, found: QuantizedWeight | None = None) -> Tensor:
        """Cast x to the base's dtype, as PEFT's layers do, where autocast does not rule."""
        if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
            return x
        dtype = self._dtype_of(found or self.quantized())
        return x if x.dtype == dtype else self._cast_input_dtype(x, dtype)

    def is_initialized(self, name: str) -> bool:
        """Whether an adapter was initialized or loaded: a Python flag, or the one transformers' loader sets."""
        if self.initialized[name]:
            return True
        parts = (self.lorasb_A[name], self.lorasb_R[name], self.lorasb_B[name])
        return all(getattr(part, LOADED, False) for part in parts)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's factors, by their names in a state dict."""
        r = self.r[name]
        return {"lorasb_A": (r, self.in_features), "lorasb_R": (r, r), "lorasb_B": (self.out_features, r)}

    def _refuse_to_train(self, core: Tensor, name: str) -> Tensor:
        """Raise in training mode; in evaluation mode give R a hook which raises if a backward comes all the same."""
        error = RuntimeError(
            f"adapter {name!r} has not been initialized: its A, B and R are zero and would learn nothing. "
            "Call lorasb.initialize(model, dataloader, lr=...) before training, or load a saved adapter"
        )
        if self.training:
            raise error

        def refuse(_: Tensor) -> None:
            raise error

        core = core.view_as(core)
        core.register_hook(refuse)
        return core

    def _core_dtype(self) -> torch.dtype:
        """R's dtype: fp32 under a 16-bit base, else the base's."""
        dtype = self.base_dtype
        return torch.float32 if dtype in HALVES else dtype

    def _device(self) -> torch.device:
        """Where the base runs; an offloaded weight lies on `meta` between forwards, and its hook knows better."""
        hook = getattr(self.base_layer, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if self.weight.is_meta and device is not None:
            return torch.device(device)
        return self.weight.device

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B R A in R's dtype, in the layout of the base weight."""
        core = self.lorasb_R[adapter]
        b, a = self.lorasb_B[adapter].to(core.dtype), self.lorasb_A[adapter].to(core.dtype)
        delta = b @ core @ a * self.scaling[adapter]
        return delta.t() if self.fan_in_fan_out else delta

    def merged_weight(self, adapter_names: list[str], sign: float = 1.0) -> Tensor:
        """The base weight with the adapters' deltas added at their own precision; ValueError if it is not finite."""
        return merging.merged_weight(self, adapter_names, sign)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add s·B R A to the base weight. A result that is not finite raises, with `safe_merge` and without.

        A quantized base gives way to a dense layer in the dtype that it computes in, and comes back with `unmerge`.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lorasb_R]
        if names:
            merging.merge(self, names)

    def unmerge(self) -> None:
        """Subtract what `merge` added, at the adapter's precision; a quantized base comes back as it was."""
        merging.unmerge(self)

    def settle_dtypes(self, adapter_name: str) -> None:
        """Put an adapter on the base's device, A and B in its dtype and frozen, R in fp32."""
        if adapter_name not in self.lorasb_R:
            return
        dtype = self.base_dtype
        for factors, wanted in ((self.lorasb_A, dtype), (self.lorasb_B, dtype), (self.lorasb_R, self._core_dtype())):
            old = factors[adapter_name]
            target = old.device if old.device.type == "meta" else self._device()
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
