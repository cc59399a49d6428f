"""`FrozenBase`: the frozen layer under the adapters, dense or quantized: its storage, its dtypes, its own result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..functional import dequantize, quantized_linear
from ..quantization.bitsandbytes import keep_unpacked
from ..quantization.quantized_weight import QuantizedWeight, compute_dtype, is_quantized, of_module
from ..utils.deprecation import renamed_method
from ..utils.dtypes import HALVES


class Reading(NamedTuple):
    """What was read of a quantized base, and what the parameter was then: a write or a move makes it stale."""

    parameter: Any
    version: int
    pointer: int
    weight: QuantizedWeight


@dataclass
class SetAside:
    """The quantized layer while a merged, dense one stands in its place; in a holder, it is no submodule."""

    layer: nn.Module | None = None


class FrozenBase(nn.Module, BaseTunerLayer):
    """A frozen linear layer, read where it lies; W [out, in], or [in, out] with `fan_in_fan_out`.

    Args:
        base_layer: the linear; dense, or in 4 or 8 bits.
        fan_in_fan_out: the weight is stored transposed, as in `transformers.Conv1D`.
        octet_dtype: what an 8-bit base computes in; its bias's dtype, or fp16, if None.

    Attributes:
        in_features, out_features: of W.
    """

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool, octet_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.fan_in_fan_out, self.octet_dtype = fan_in_fan_out, octet_dtype
        self._reading: Reading | None = None
        self._set_aside = SetAside()
        keep_unpacked(base_layer)
        weight = self.quantized()
        out_features, in_features = weight.shape if weight is not None else self.dense_weight().shape
        self.in_features, self.out_features = int(in_features), int(out_features)

    def quantized(self) -> QuantizedWeight | None:
        """What the base layer stores, if it is quantized; read once, and again when it was replaced or written to."""
        base = self._modules["base_layer"]  # nn.Module's own way there takes longer than a small product
        if base is None or type(base) is nn.Linear or not is_quantized(base):
            return None
        reading, parameter = self._reading, base._parameters["weight"]
        if reading is not None:
            if torch.compiler.is_compiling():  # `_apply` keeps it up to date; a graph has no pointers
                return reading.weight
            fresh = reading.parameter is parameter and reading.version == parameter._version
            if fresh and reading.pointer == parameter.data_ptr():  # type: ignore[union-attr]
                return reading.weight
        weight = of_module(base)
        if weight is not None:
            self._reading = Reading(parameter, parameter._version, parameter.data_ptr(), weight)  # type: ignore[union-attr]
        return weight

    quantised = renamed_method("quantised", "quantized")

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenBase:
        """Moves and casts: what was read of a quantized base is read again."""
        super()._apply(fn, recurse)
        if self._reading is not None and not self.base_layer.weight.is_meta:
            self._reading = None
            self.quantized()
        return self

    def base_weight(self) -> Tensor:
        """The base layer's weight as it is stored."""
        return cast(Tensor, self.get_base_layer().weight)

    def dense_weight(self) -> Tensor:
        """W [out, in]: the base layer's weight, or a view of it; of a quantized one, what its bits stand for."""
        quantized = self.quantized()
        if quantized is not None:
            return dequantize(quantized)
        weight = self.base_weight()
        return weight.t() if self.fan_in_fan_out else weight

    def set_base_weight(self, weight: Tensor) -> None:
        """Put merged values in the base weight's place; over a quantized base, a dense layer that has them."""
        if self.quantized() is None:
            self.base_weight().data = weight
            return
        self._set_aside.layer = self.base_layer
        bias = cast("Tensor | None", self.get_base_layer().bias)
        dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.base_layer = dense.train(self.training)

    def take_back(self) -> bool:
        """Put a quantized base back that `set_base_weight` had set aside; False where there is none."""
        if self._set_aside.layer is None:
            return False
        self.base_layer, self._set_aside.layer = self._set_aside.layer, None
        return True

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base computes in, which A and B have too."""
        return self._dtype_of(self.quantized())

    def _dtype_of(self, quantized: QuantizedWeight | None) -> torch.dtype:
        if quantized is None:
            return self.base_weight().dtype
        if quantized.kind == "int8" and self.octet_dtype is not None:
            return self.octet_dtype
        return compute_dtype(self.base_layer, quantized)

    @property
    def core_dtype(self) -> torch.dtype:
        """R's dtype: fp32 under a 16-bit base, else the base's."""
        dtype = self.base_dtype
        return torch.float32 if dtype in HALVES else dtype

    @property
    def execution_device(self) -> torch.device:
        """Where the base runs; an offloaded weight lies on `meta` between forwards, and its hook knows better."""
        hook = getattr(self.base_layer, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        weight = self.base_weight()
        return torch.device(device) if weight.is_meta and device is not None else weight.device

    def base_must_run(self) -> bool:
        """True if reading the weight would bypass something: offloading or sharding hooks, or another forward."""
        base = self.base_layer
        plain = type(base).forward is nn.Linear.forward or self.fan_in_fan_out or is_quantized(base)
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            not plain
            or bool(hooked)
            or "forward" in vars(base)
            or "_hf_hook" in vars(base)
            or hasattr(base._parameters.get("weight"), "ds_id")  # DeepSpeed ZeRO-3 partitions it
        )

    def on_base_dtype(self, x: Tensor, quantized: QuantizedWeight | None = None) -> Tensor:
        """Cast x to the base's dtype, as PEFT's layers do, where autocast does not rule."""
        if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
            return x
        dtype = self._dtype_of(quantized or self.quantized())
        return x if x.dtype == dtype else self._cast_input_dtype(x, dtype)

    def bias_like(self, x: Tensor) -> Tensor | None:
        """The bias in x's dtype: a quantized layer's own may be in another."""
        bias = cast("Tensor | None", self.base_layer.bias)
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own result. A quantized one is computed from its storage, without its module's forward."""
        quantized = None if args or kwargs or self.base_must_run() else self.quantized()
        merged_dense = self._set_aside.layer is not None  # in the dtype that the quantized layer computed in
        if quantized is None and not merged_dense:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        given, x = x.dtype, self.on_base_dtype(x, quantized)
        if quantized is None:
            y = cast(Tensor, self.base_layer(x, *args, **kwargs))
        else:
            y = quantized_linear(x, quantized, self.bias_like(x))
        return y if torch.is_autocast_enabled(x.device.type) else y.to(given)
