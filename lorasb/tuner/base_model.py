"""Checks of the model that an adapter is added to: its dtype, its weights and its other adapters."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.adapter_file import difference
from ..config.adapter import LoRASBConfig
from ..layers.adapted_layer import AdaptedLayer
from ..layers.base import weight_present
from ..layers.lookup import any_merged, layers_with
from ..layers.opaque_format import has_weight_values
from ..layers.weight_adapter import LoRASBEmbedding
from .targets import base_of


def float_dtype(model: nn.Module) -> torch.dtype | None:
    """The model's dtype if it is a floating-point one, else None."""
    dtype = getattr(model, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def check_base(model: nn.Module, config: LoRASBConfig, targets: dict[str, nn.Module]) -> None:
    """Raise if the targets' weights are not those that the adapter was made on."""
    if not config.base_fingerprint or any_merged(model):
        return
    weights = {name: getattr(base_of(module), "weight", None) for name, module in targets.items()}
    reason = difference(weights, config.base_fingerprint)
    if reason:
        raise ValueError(
            f"this adapter was made on {config.base_model_name_or_path or 'another base model'}, and this base "
            f"is another one: {reason}. Load the adapter's own base; if you mean it: "
            "PeftModel.from_pretrained(base, folder, check_base=False)"
        )


def can_initialize_now(
    model: nn.Module, config: LoRASBConfig, adapter_name: str, layers: dict[str, AdaptedLayer]
) -> bool:
    """True if the init is data-free, W has values, and neither saved weights nor another adapter's A and B follow."""
    if config.init == "update" or config.basis or config.from_file or any_merged(model):
        return False
    # Meta tensors have no values: PEFT's low_cpu_mem_usage makes such adapters, to be loaded afterwards.
    return all(
        has_weight_values(layer.get_base_layer()) and not layer.lorasb_A[adapter_name].is_meta
        for layer in layers.values()
    )


def refuse_duplicates(model: nn.Module, adapter_name: str) -> None:
    """Raise a ValueError if the model has an adapter of this name."""
    for name in layers_with(model, adapter_name):
        raise ValueError(
            f"{name} has an adapter {adapter_name!r} already: the model is patched. Use "
            "model.add_adapter(another_name, LoRASBConfig(...)) for one more, or model.unload() to start again"
        )


def check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise if a merged weight would not be finite or is also another module's; changes no layer."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, AdaptedLayer):
            continue
        requested = adapter_names if adapter_names is not None else module.active_adapters
        names = [n for n in requested if n in module.lorasb_R and n not in module.merged_adapters]
        if names:
            shared = owners.get(id(getattr(module.get_base_layer(), "weight", None)), [])
            if len(shared) > 1 and not isinstance(module, LoRASBEmbedding):  # which merges into a copy
                raise ValueError(
                    f"{name}: expected a separate weight to merge into, got one that {' and '.join(shared)} share, "
                    "which would all get the update: keep the adapter apart, or untie the weights before patching"
                )
            try:
                with weight_present(module.get_base_layer()):
                    module.merged_weight(names)  # one layer's W at a time; dropped at once
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
