"""Requantization after a merge: the same type, block size and nesting as before, with the rounding error reported."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ..functional import dequantize
from ..quantization.quantized_weight import KINDS, QuantizedWeight, of_state
from ..quantization.quantizer import quantize_4bit
from .linear import LoRASBLinear
from .linear4bit import Linear4bit


@dataclass(frozen=True)
class Requantized:
    """The quantized weights that a model had before a merge, by layer name."""

    layers: dict[str, QuantizedWeight]

    @classmethod
    def of(cls, model: nn.Module) -> Requantized:
        """Collect the 4-bit base layers of a patched model.

        Raises:
            ValueError: the model has none under an adapter.
        """
        layers = {}
        for name, layer in model.named_modules():
            weight = layer.quantized() if isinstance(layer, LoRASBLinear) else None
            if weight is not None and weight.kind in KINDS:
                layers[name] = weight
        if not layers:
            raise ValueError("requantize=True puts 4-bit layers back into 4 bits: this model has none under an adapter")
        return cls(layers)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Quantize those layers of the merged model again.

        Sets `model.requantization_errors`: layer name -> ‖W₄ − W‖ / ‖W‖ (Frobenius), W being the merged weight.
        """
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


def _requantize(model: nn.Module, name: str, layer: nn.Linear, old: QuantizedWeight) -> float:
    """Replace one layer of the model by a 4-bit one; returns ‖W₄ − W‖ / ‖W‖."""
    dense = layer.weight.detach()
    packed, state = quantize_4bit(dense, old.kind, old.block, old.nested)
    wide, rounded = dense.float(), dequantize(of_state(packed, state), torch.float32)
    bias = None if layer.bias is None else layer.bias.detach()
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Linear4bit(packed, state, bias).train(layer.training))
    return float((rounded - wide).norm() / wide.norm().clamp_min(1e-30))  # an all-zero W has error 0
