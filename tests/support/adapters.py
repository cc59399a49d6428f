"""Which layers of a model are adapted, and which of its parameters train."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorasb.layers.linear import LoRASBLinear


def layers(model: nn.Module, kind: type[nn.Module] = LoRASBLinear) -> dict[str, Any]:
    """Adapted layers by their names in the base model."""
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, kind)}


def adapted(model: nn.Module) -> set[str]:
    return set(layers(model))


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}
