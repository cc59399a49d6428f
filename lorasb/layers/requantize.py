"""Requantization after a merge: the format that a layer had before, with the rounding error reported."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import dequantize
from ..quantization.quantized_weight import KINDS, QuantizedWeight, of_state
from ..quantization.quantizer import quantize_4bit
from .base_weight import OpaqueBase
from .linear import LoRASBLinear
from .linear4bit import Linear4bit


@dataclass(frozen=True)
class OpaqueLayer:
    """Another quantizer's layer, and what is known of its format."""

    layer: nn.Module
    opaque: OpaqueBase


@dataclass(frozen=True)
class Requantized:
    """The quantized weights, or other quantizers' layers, that a model had before a merge, by layer name."""

    layers: dict[str, QuantizedWeight | OpaqueLayer]

    @classmethod
    def of(cls, model: nn.Module) -> Requantized:
        """Collect the 4-bit and opaque base layers of a patched model."""
        layers: dict[str, QuantizedWeight | OpaqueLayer] = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, LoRASBLinear):
                continue
            weight, opaque = layer.quantized(), layer.opaque()
            if weight is not None and weight.kind in KINDS:
                layers[name] = weight
            if opaque is not None and not opaque.requantizes:
                raise ValueError(
                    f"requantize=True: the {opaque.name} layer {name!r} cannot be quantized again, merge without it"
                )
            if opaque is not None:
                layers[name] = OpaqueLayer(layer.base_layer, opaque)
        if not layers:
            raise ValueError("requantize=True puts back quantized layers: this model has none under an adapter")
        return cls(layers)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Quantize those layers of the merged model again."""
        # Sets `model.requantization_errors`: layer name -> ‖Q − W‖ / ‖W‖ (Frobenius), Q being W, the merged weight,
        # after quantization.
        errors = {}
        for name, old in self.layers.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                errors[name] = _requantize(model, name, layer, old)
        model.requantization_errors = errors  # type: ignore[assignment]
        worst = max(errors, key=errors.__getitem__)
        logging.getLogger("lorasb").warning(
            "requantized %d layers: relative error of a weight %.3f on average, %.3f at most (%s)",
            len(errors),
            sum(errors.values()) / len(errors),
            errors[worst],
            worst,
        )


def _requantize(model: nn.Module, name: str, layer: nn.Linear, old: QuantizedWeight | OpaqueLayer) -> float:
    """Replace one layer of the model by a quantized one; returns ‖Q − W‖ / ‖W‖."""
    wide = layer.weight.detach().float()
    new, rounded = _through_quantizer(layer, old) if isinstance(old, OpaqueLayer) else _in_four_bits(layer, old)
    model.set_submodule(name, new)
    return float((rounded - wide).norm() / wide.norm().clamp_min(1e-30))  # an all-zero W has error 0


def _in_four_bits(layer: nn.Linear, old: QuantizedWeight) -> tuple[nn.Module, Tensor]:
    """A 4-bit layer of the same kind, and its values."""
    packed, state = quantize_4bit(layer.weight.detach(), old.kind, old.block, old.nested)
    bias = None if layer.bias is None else layer.bias.detach()
    return Linear4bit(packed, state, bias).train(layer.training), dequantize(of_state(packed, state), torch.float32)


def _through_quantizer(layer: nn.Linear, old: OpaqueLayer) -> tuple[nn.Module, Tensor]:
    """A layer of the other quantizer, and its values."""
    new = old.opaque.requantize(old.layer, layer.weight.detach())
    return new.train(layer.training), old.opaque.dequantize(new).float()
