"""Adapters merged into a layer's base weight, and taken out again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..functional import dequantize

if TYPE_CHECKING:
    from .linear import LoRASBLinear


def merged_weight(layer: LoRASBLinear, names: list[str], sign: float = 1.0) -> Tensor:
    """The base weight with the adapters' deltas added at their own precision, then rounded once.

    Raises:
        ValueError: the result is not finite.
    """
    found = layer.quantized()
    weight = layer.base_weight().detach() if found is None else dequantize(found, layer.base_dtype)
    total = weight
    for name in names:
        total = total + sign * layer.get_delta_weight(name)
    merged = total.to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(
            f"merging adapters {names} gives weights that are not finite in {weight.dtype}; the weights were left as "
            "they are. Check the adapter's training, or merge into a wider dtype"
        )
    return merged


def merge(layer: LoRASBLinear, names: list[str]) -> None:
    """Put the sum in the base weight's place, or a dense layer in a quantized one's."""
    merged = merged_weight(layer, names)
    if layer.quantized() is not None:
        layer._packed_base.append(layer.base_layer)
        layer.base_layer = _dense_layer(layer, merged)
    else:
        layer.base_weight().data = merged
    layer.merged_adapters.extend(names)


def _dense_layer(layer: LoRASBLinear, weight: Tensor) -> nn.Linear:
    """A frozen `nn.Linear` with this weight and the base's bias."""
    bias = cast("Tensor | None", layer.get_base_layer().bias)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return dense.train(layer.training)


def unmerge(layer: LoRASBLinear) -> None:
    """Take out what was merged."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return
    if layer._packed_base:
        layer.base_layer = layer._packed_base.pop()
    else:
        layer.base_weight().data = merged_weight(layer, layer.merged_adapters, sign=-1.0)
    layer.merged_adapters.clear()
