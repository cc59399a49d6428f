"""Look up the LoRA-SB layers of a model, by adapter name."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..constants import PEFT_PREFIX
from .linear import LoRASBLinear
from .weight_adapter import LoRASBWeight


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, LoRASBLinear]:
    """The layers that have the adapter, by their names in the base model (without PEFT's prefix)."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoRASBLinear) and adapter_name in module.lorasb_R
    }


def layer_kinds(layers: dict[str, LoRASBLinear]) -> dict[str, list[Any]] | None:
    """Kind, parameter, groups and shape of the layers that adapt no linear's weight; None without any."""
    weights = {name: layer for name, layer in layers.items() if isinstance(layer, LoRASBWeight)}
    found = {n: m.unfolding.described(getattr(m.get_base_layer(), "groups", 1)) for n, m in weights.items()}
    return found or None


def any_merged(model: nn.Module) -> bool:
    """True if any layer has an adapter merged into its base weight."""
    return any(module.merged for module in model.modules() if isinstance(module, LoRASBLinear))


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, LoRASBLinear]]:
    """An adapter's name (the active one unless given) and its layers, by their names in the base model."""
    all_layers = [module for module in model.modules() if isinstance(module, LoRASBLinear)]
    if not all_layers:
        raise ValueError("expected a model with LoRA-SB layers: call model = lorasb.patch(model) first")
    active = all_layers[0].active_adapters
    name = adapter_name or (active[0] if active else "")
    layers = layers_with(model, name)
    if not layers:
        adapters = sorted({adapter for layer in all_layers for adapter in layer.lorasb_R})
        raise ValueError(f"no layer has an adapter {name!r}: the model has {', '.join(adapters) or 'none'}")
    return name, layers


def uninitialized(layers: dict[str, LoRASBLinear], adapter_name: str) -> list[str]:
    """Names of layers whose adapter has not been initialized."""
    return [name for name, layer in layers.items() if not layer.is_initialized(adapter_name)]


def standing_on(model: nn.Module, adapter_name: str) -> list[str]:
    """The adapters that have an adapter's A and B."""
    layers = [module for module in model.modules() if isinstance(module, LoRASBLinear)]
    return sorted({name for layer in layers for name, basis in layer.bases.items() if basis == adapter_name})


def refuse_shared_basis(layers: dict[str, LoRASBLinear], adapter_name: str) -> None:
    """Raise a ValueError where new A and B would be those of other adapters, too."""
    for layer in layers.values():
        if adapter_name in layer.bases:
            raise ValueError(
                f"adapter {adapter_name!r} has the A and B of {layer.bases[adapter_name]!r}, which new ones would "
                "replace there, too: make an adapter with separate factors, without basis=..."
            )
        others = [name for name, basis in layer.bases.items() if basis == adapter_name]
        others += ["the model's bank"] if layer.serves_bank(adapter_name) else []
        if others:
            raise ValueError(
                f"adapter {adapter_name!r} is the basis of {', '.join(others[:3])}, whose R would mean nothing on "
                "other A and B: delete those first, or use an adapter of another name"
            )
