"""Finding LoRA-SB layers and adapters in a model."""

from __future__ import annotations

from torch import nn

from ..constants import PEFT_PREFIX
from .linear import LoRASBLinear


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, LoRASBLinear]:
    """The layers that have an adapter, by their names in the base model."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoRASBLinear) and adapter_name in module.lorasb_R
    }


def any_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged into a base weight anywhere."""
    return any(module.merged for module in model.modules() if isinstance(module, LoRASBLinear))


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, LoRASBLinear]]:
    """An adapter's name (the active one unless given) and its layers, by their names in the base model.

    Raises:
        ValueError: no LoRA-SB layers, or none with that adapter.
    """
    every = [module for module in model.modules() if isinstance(module, LoRASBLinear)]
    if not every:
        raise ValueError("expected a model with LoRA-SB layers: call model = lorasb.patch(model) first")
    active = every[0].active_adapters
    name = adapter_name or (active[0] if active else "")
    layers = layers_with(model, name)
    if not layers:
        known = sorted({known for module in every for known in module.lorasb_R})
        raise ValueError(f"no layer has an adapter {name!r}: the model has {', '.join(known) or 'none'}")
    return name, layers
