"""`FrozenBase`: access to the frozen linear under the adapters: weight, dtypes, device and forward.

The linear is dense, quantized (in storage that our kernels read) or opaque (another quantizer's, which is called).
`LoRASBLinear` inherits from it and adds the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..functional import dequantize, quantized_linear
from ..ops.autocast import autocast_on
from ..quantization.bitsandbytes import keep_unpacked
from ..quantization.quantized_weight import QuantizedWeight, compute_dtype, is_quantized, of_module
from ..utils.deprecation import renamed_method
from ..utils.dtypes import SIXTEEN_BIT
from . import opaque_base
from .opaque_base import OpaqueBase


class CachedWeight(NamedTuple):
    """A `QuantizedWeight` read from the base layer, and the state of the parameter that it was read from.

    All three of identity, version and pointer are compared, as each misses a kind of change: assigning a new parameter
    may reuse the address, in-place ops bump the version alone, and `parameter.data = ...` changes the pointer alone.
    """

    parameter: Any
    version: int
    pointer: int
    weight: QuantizedWeight


@dataclass
class ReplacedBase:
    """The quantized or opaque base layer while a merged dense one replaces it.

    A plain object around the module keeps `nn.Module.__setattr__` from registering it as a second submodule, which
    would put its weight into state dicts and parameter counts.
    """

    layer: nn.Module | None = None


class FrozenBase(nn.Module, BaseTunerLayer):
    """A frozen linear layer, W [out, in], or [in, out] if `fan_in_fan_out`.

    Args:
        base_layer: the linear layer; dense, quantized to 4 or 8 bits, or opaque.
        fan_in_fan_out: the weight is stored transposed, as in `transformers.Conv1D`.
        octet_dtype: compute dtype of storage that does not record it (8 bits; the dtype of its bias, or fp16 without
            one, if None).
        resolver_options: of PEFT's resolver of quantized layers: `get_quantization_kwargs(model)`.

    Attributes:
        in_features, out_features: dimensions of W.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        fan_in_fan_out: bool,
        octet_dtype: torch.dtype | None,
        resolver_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # a new module would be in training mode inside a model in eval mode
        self.fan_in_fan_out, self.octet_dtype = fan_in_fan_out, octet_dtype
        self._cached_weight: CachedWeight | None = None
        self._replaced = ReplacedBase()
        self.trains_bias = False  # our ops do not differentiate the bias: the base's own forward does
        keep_unpacked(base_layer)  # before any evaluation: the repacking is not always reversible
        unfolding = getattr(self, "unfolding", None)  # of a `LoRASBWeight`
        self._opaque = None if unfolding else opaque_base.find(base_layer, octet_dtype, resolver_options)
        known = unfolding or self._opaque or self.quantized()
        out_features, in_features = known.shape if known is not None else self.dense_weight().shape
        self.in_features, self.out_features = int(in_features), int(out_features)

    def opaque(self) -> OpaqueBase | None:
        """What is known of an opaque base layer; None for others, and while a merged dense layer replaces it."""
        return self._opaque if self._replaced.layer is None else None

    def quantized(self) -> QuantizedWeight | None:
        """The storage of a quantized base layer, None for others; cached until the parameter changes."""
        # This runs in every forward: `nn.Module.__getattr__` takes longer than a small matrix product.
        base = self._modules["base_layer"]
        if base is None or type(base) is nn.Linear or not is_quantized(base):  # by type first: the common, cheap case
            return None
        cached, parameter = self._cached_weight, base._parameters["weight"]
        if cached is not None:
            # Fake tensors have no data_ptr, and reading it would break the graph; `_apply` refreshes the cache.
            if torch.compiler.is_compiling():
                return cached.weight
            fresh = cached.parameter is parameter and cached.version == parameter._version
            if fresh and cached.pointer == parameter.data_ptr():  # type: ignore[union-attr]
                return cached.weight
        weight = of_module(base)
        if weight is not None:
            version, pointer = parameter._version, parameter.data_ptr()  # type: ignore[union-attr]
            self._cached_weight = CachedWeight(parameter, version, pointer, weight)
        return weight

    quantised = renamed_method("quantised", "quantized")

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenBase:
        """Move or cast the layer, and read a quantized base again."""
        super()._apply(fn, recurse)
        # Read at once, not at the next forward: a compiled forward returns the cache without checking it.
        if self._cached_weight is not None and not self.base_layer.weight.is_meta:
            self._cached_weight = None
            self.quantized()
        return self

    def base_weight(self) -> Tensor:
        """The base layer's weight parameter, in its stored layout: packed if quantized, [in, out] if transposed.

        Of an opaque layer without a parameter of that name, some tensor of its storage.
        """
        base = self._modules["base_layer"]  # as in `quantized`: every forward asks, and more than once
        weight = base._parameters.get("weight") if type(base) is nn.Linear else None
        if weight is not None:
            return weight
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        return weight if isinstance(weight, Tensor) else opaque_base.first_tensor(base)

    def dense_weight(self) -> Tensor:
        """W [out, in]: the base layer's weight or a transposed view of it, dequantized if it is quantized.

        Raises:
            ValueError: the base layer is opaque, and its format has no way to W.
        """
        quantized, opaque = self.quantized(), self.opaque()
        if quantized is not None:
            return dequantize(quantized)
        if opaque is not None:
            return opaque.dequantize(self.base_layer)
        weight = self.base_weight()
        return weight.t() if self.fan_in_fan_out else weight

    def set_base_weight(self, weight: Tensor) -> None:
        """Set the base weight to merged values; a layer that is not dense is replaced by a dense one with them."""
        if self.quantized() is None and self.opaque() is None:
            self.base_weight().data = weight  # the parameter object stays, with whatever refers to it
            return
        self._replaced.layer = self.base_layer
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        # On meta nothing is allocated or drawn from the random generator: both parameters are assigned below.
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.base_layer = dense.train(self.training)

    def refuse_computed_weight(self) -> None:
        """Raise a ValueError if the base computes W in every forward, so that merged values would be lost."""
        base = self.get_base_layer()
        named = [name.rpartition(".")[2] for name, _ in base.named_parameters(recurse=False)]
        if hasattr(base, "parametrizations") or {"weight_g", "weight_v", "weight_orig"} & set(named):
            raise ValueError(
                f"a {type(base).__name__} computes its weight in every forward (weight_norm, spectral_norm), and "
                "merged values would be lost: remove that first (torch.nn.utils.parametrize.remove_parametrizations), "
                "or keep the adapter apart: lorasb.export_lora(model, path)"
            )

    def restore_replaced_base(self) -> bool:
        """Undo `set_base_weight` over a quantized or opaque base; False if no base layer was replaced."""
        if self._replaced.layer is None:
            return False
        self.base_layer, self._replaced.layer = self._replaced.layer, None
        return True

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base computes in; also the dtype of A and B."""
        return self._dtype_of(self.quantized())

    def _dtype_of(self, quantized: QuantizedWeight | None) -> torch.dtype:
        if quantized is None:
            opaque = self.opaque()
            return self.base_weight().dtype if opaque is None else opaque.dtype
        if quantized.kind == "int8" and self.octet_dtype is not None:
            return self.octet_dtype
        return compute_dtype(self.base_layer, quantized)

    @property
    def core_dtype(self) -> torch.dtype:
        """The dtype of R: fp32 for a 16-bit base, where small updates would round to nothing, else the base's."""
        dtype = self.base_dtype
        return torch.float32 if dtype in SIXTEEN_BIT else dtype

    @property
    def execution_device(self) -> torch.device:
        """The device that the base runs on.

        accelerate keeps offloaded weights on `meta` between forwards; the hook that loads them names the device.
        """
        hook = getattr(self.base_layer, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        weight = self.base_weight()
        return torch.device(device) if weight.is_meta and device is not None else weight.device

    def base_must_run(self) -> bool:
        """True if the base layer's own forward has to run, as reading its weight would bypass hooks or patches."""
        base: Any = self._modules["base_layer"]  # as in `quantized`
        if self.trains_bias or (self._opaque is not None and self._replaced.layer is None):
            return True
        # Conv1D (fan_in_fan_out) and quantized layers have forwards of their own, whose results we compute ourselves.
        plain = type(base).forward is nn.Linear.forward or self.fan_in_fan_out or is_quantized(base)
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            not plain
            or bool(hooked)
            or "forward" in vars(base)  # accelerate and others patch the instance's forward
            or "_hf_hook" in vars(base)
            or hasattr(base._parameters.get("weight"), "ds_id")  # partitioned by DeepSpeed ZeRO-3 between forwards
        )

    def on_base_dtype(self, x: Tensor, quantized: QuantizedWeight | None = None) -> Tensor:
        """x in the base's dtype, as PEFT's layers cast it; unchanged under autocast, which chooses the dtype itself."""
        dtype = self._dtype_of(quantized or self.quantized())
        if x.dtype == dtype or autocast_on(x.device.type) or not x.is_floating_point():
            return x
        return self._cast_input_dtype(x, dtype)

    def base_bias(self) -> Tensor | None:
        """The base layer's bias."""
        base: Any = self._modules["base_layer"]  # as in `quantized`: PEFT's property takes as long as a small product
        return cast("Tensor | None", base._parameters["bias"] if type(base) is nn.Linear else base.bias)

    def bias_like(self, x: Tensor) -> Tensor | None:
        """The bias in x's dtype; a quantized layer may store it in another."""
        bias = self.base_bias()
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of the base layer alone. A quantized one is computed from its storage, without its module's forward."""
        quantized = None if args or kwargs or self.base_must_run() else self.quantized()
        # Merged into a quantized base, the dense layer has the quantized layer's compute dtype: x is cast for it, too.
        merged_dense = self._replaced.layer is not None
        if quantized is None and not merged_dense:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        input_dtype, x = x.dtype, self.on_base_dtype(x, quantized)
        if quantized is None:
            y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        else:
            y = quantized_linear(x, quantized, self.bias_like(x))
        return y if autocast_on(x.device.type) else y.to(input_dtype)
