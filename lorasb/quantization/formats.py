"""Formats of quantizers that PEFT's resolver does not know, or knows no way to W of: one line each in `FORMATS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Packages by the names of their layers' classes, for messages: a layer is recognized only where its package is there.
PACKAGES = {
    "HQQLinear": "hqq",
    "QuantizedLinear": "aqlm",
    "EetqLinear": "eetq",
    "QuantLinear": "gptqmodel",
    "WQLinear_GEMM": "gptqmodel",
    "PatchedLinear": "neural-compressor",
}


@dataclass(frozen=True)
class Format:
    """A quantizer's linear, known by its class without an import."""

    name: str  # for messages
    package: str  # top-level
    class_name: str  # of the layer's class, or of one that it derives from
    dequantize: Callable[[Any], Tensor]  # from the layer to W [out, in]
    requantize: Callable[[Any, Tensor], nn.Module] | None = None  # from the layer and W [out, in] to another such layer

    def matches(self, layer: nn.Module) -> bool:
        """True for a layer of this format."""
        return any(
            kind.__name__ == self.class_name and kind.__module__.partition(".")[0] == self.package
            for kind in type(layer).__mro__
        )


def _requantized_quanto(layer: Any, weight: Tensor) -> nn.Module:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias
    kind = importlib.import_module("optimum.quanto").QLinear
    new: Any = kind.from_module(dense, weights=layer.weight_qtype, activations=layer.activation_qtype)
    new.freeze()  # quanto's word for quantizing W once, instead of in every call
    result: nn.Module = new
    return result


FORMATS = (
    Format("optimum-quanto", "optimum", "QLinear", lambda layer: layer.weight.dequantize(), _requantized_quanto),
    Format("GPTQ", "gptqmodel", "BaseQuantLinear", lambda layer: layer.dequantize_weight().t()),
)


def format_of(layer: nn.Module) -> Format | None:
    return next((one for one in FORMATS if one.matches(layer)), None)
