"""Which layers of a model are adapted, and which of its parameters train."""

from __future__ import annotations

from torch import nn

from lorasb.layers.linear import LoRASBLinear


def adapted(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoRASBLinear)}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}
