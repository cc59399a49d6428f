"""Back to 4 bits after a merge: the same kind, block and nesting as before, and how much that rounds away."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ..functional import dequantize_nf4
from ..quantization.quantized_weight import KINDS, QuantisedWeight, of_state
from ..quantization.quantizer import quantize_4bit
from .linear import LoRASBLinear
from .linear4bit import Linear4bit


@dataclass(frozen=True)
class Requantised:
    """How the layers of a model were quantised, by name."""

    layers: dict[str, QuantisedWeight]

    @classmethod
    def of(cls, model: nn.Module) -> Requantised:
        """The 4-bit layers of a patched model.

        Raises:
            ValueError: there are none.
        """
        found = {}
        for name, layer in model.named_modules():
            weight = layer.quantised() if isinstance(layer, LoRASBLinear) else None
            if weight is not None and weight.kind in KINDS:
                found[name] = weight
        if not found:
            raise ValueError("requantize=True puts 4-bit layers back into 4 bits: this model has none under an adapter")
        return cls(found)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Quantise those layers of the merged model again, and set `model.requantization_errors`."""
        errors = {}
        for name, old in self.layers.items():
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                continue
            dense = layer.weight.detach()
            packed, state = quantize_4bit(dense, old.kind, old.block, old.nested)
            wide, error = dense.float(), dequantize_nf4(of_state(packed, state), torch.float32)
            errors[name] = float((error - wide).norm() / wide.norm().clamp_min(1e-30))
            bias = None if layer.bias is None else layer.bias.detach()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear4bit(packed, state, bias).train(layer.training))
        model.requantization_errors = errors  # type: ignore[assignment]
        worst = max(errors, key=errors.__getitem__)
        logging.getLogger("lorasb").warning(
            "requantised %d layers: relative error of a weight %.3f on average, %.3f at most (%s)",
            len(errors), sum(errors.values()) / len(errors), errors[worst], worst,
        )  # fmt: skip
