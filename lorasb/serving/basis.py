"""Adapters on a basis: A and B are another adapter's own tensors, and only R is separate."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ..checkpoints import shared_factors
from ..checkpoints.adapter_file import group_by_layer
from ..config.adapter import LoRASBConfig
from ..constants import FROZEN_FACTORS
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import layers_with, refuse_shared_basis, standing_on, uninitialized

# Settings that R's meaning depends on besides A and B, which a file of R alone has to say, too.
COPIED = ("init", "lora_alpha", "scaling", "wide_factors", "task_type", "target_parameters")


def resolve(model: nn.Module, config: LoRASBConfig, configs: Mapping[str, PeftConfig]) -> None:
    """Write the layers, ranks and scaling of the basis into the config of an adapter on it, or raise a ValueError."""
    if not config.basis or config.from_file:  # a file's config has them; A and B are found by their digest (`loading`)
        return
    layers = layers_with(model, config.basis)
    if not layers:
        known = sorted({n for m in model.modules() if isinstance(m, AdaptedLayer) for n in m.lorasb_R})
        raise ValueError(
            f"basis={config.basis!r} is no adapter of this model, which has {', '.join(known) or 'none'}: make and "
            "initialize that one first"
        )
    ranks = {name: layer.adapters[config.basis].r for name, layer in layers.items()}
    largest = max(ranks.values())
    if config.r not in (None, largest):
        raise ValueError(f"an adapter on {config.basis!r} has its rank, {largest}, got r={config.r}: leave r out")
    fresh = uninitialized(layers, config.basis)
    if fresh:
        raise ValueError(
            f"basis {config.basis!r} has not been initialized ({fresh[0]}): call lorasb.initialize(model, dataloader, "
            f"adapter_name={config.basis!r}, lr=...) first"
        )
    for field in COPIED if config.basis in configs else ():
        setattr(config, field, copy.deepcopy(getattr(configs[config.basis], field)))
    config.target_modules = set(layers)
    config.r = largest
    config.rank_pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.start_at = config.basis if config.basis_start == "same" else None
    config.basis = next(iter(layers.values())).bases.get(config.basis, config.basis)  # whose the tensors are


def refuse_deletion(model: nn.Module, adapter_name: str) -> None:
    """Raise a ValueError for an adapter whose A and B others have."""
    others = standing_on(model, adapter_name)
    if any(layer.serves_bank(adapter_name) for layer in layers_with(model, adapter_name).values()):
        raise ValueError(f"adapter {adapter_name!r} is the basis of the model's bank: call bank.detach() first")
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(f"adapter {adapter_name!r} is the basis of {shown}: delete those first")


def without_factors(tensors: dict[str, Tensor], layers: dict[str, AdaptedLayer], adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors for a file: R, and the digest of A and B if those are another adapter's."""
    if not any(adapter in layer.bases for layer in layers.values()):
        return tensors
    # of the tensors that were gathered to be saved, as those of the layers may be shards
    digest = shared_factors.digest(_factors_in(tensors) or frozen_factors(layers, adapter))
    own = {key: value for key, value in tensors.items() if not shared_factors.is_factor(key)}
    return own | {shared_factors.DIGEST: torch.tensor(list(digest), dtype=torch.uint8)}


def _factors_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = group_by_layer(tensors).items()
    return {f"{name}.{part}": parts[part] for name, parts in layers for part in FROZEN_FACTORS if part in parts}


def frozen_factors(layers: dict[str, AdaptedLayer], adapter_name: str) -> dict[str, Tensor]:
    """An adapter's A and B in the model, under the names that they have in a file."""
    return {
        f"{name}.{part}": getattr(layer, part)[adapter_name].detach()
        for name, layer in layers.items()
        for part in FROZEN_FACTORS
    }


def with_digest(layers: dict[str, AdaptedLayer], digest: bytes, first: str) -> str | None:
    """The adapter of all these layers whose A and B have a digest; `first` is tried first."""
    candidates = dict.fromkeys((first, *(name for layer in layers.values() for name in layer.lorasb_R)))
    seen: set[tuple[int, ...]] = set()
    for name in candidates:
        if not all(name in layer.lorasb_R for layer in layers.values()):
            continue
        factors = frozen_factors(layers, name)
        key = tuple(value.data_ptr() for value in factors.values())
        if key not in seen and shared_factors.digest(factors) == digest:
            return name
        seen.add(key)
    return None


def stand_on(layers: dict[str, AdaptedLayer], adapter_name: str, basis: str) -> None:
    for layer in layers.values():
        layer.stand_on(adapter_name, layer.bases.get(basis, basis))


def make_room(layers: dict[str, AdaptedLayer], adapter_name: str, tensors: dict[str, Tensor]) -> bool:
    """Let a file's own A and B be written; True if the adapter left its basis, a ValueError if others share them."""
    shared = adapter_name in {name for layer in layers.values() for pair in layer.bases.items() for name in pair}
    if not shared and not any(layer.serves_bank(adapter_name) for layer in layers.values()):
        return False
    if shared_factors.digest(_factors_in(tensors)) == shared_factors.digest(frozen_factors(layers, adapter_name)):
        return False
    leaves = any(adapter_name in layer.bases for layer in layers.values())
    for layer in layers.values():
        layer.leave_basis(adapter_name)
    refuse_shared_basis(layers, adapter_name)
    return leaves


def options_for(layer: AdaptedLayer, config: LoRASBConfig) -> dict[str, Any]:
    """Arguments of `add_adapter` for an adapter that shares the factors of one of the layer's; none for others."""
    if not config.basis or config.from_file or config.basis not in layer.lorasb_R:
        return {}
    return {"basis": config.basis, "start_at": config.start_at, "scaling": layer.adapters[config.basis].scaling}
