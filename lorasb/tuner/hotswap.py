"""`peft.utils.hotswap.hotswap_adapter` for LoRA-SB: another adapter's values into the parameters of a loaded one, which
stay the same objects, so that a compiled model is not compiled again.
"""

from __future__ import annotations

import os
from typing import Any

import peft
import torch

from ..checkpoints import adapter_file
from ..checkpoints.base_fingerprint import difference
from ..compat.torch import uncompiled
from ..config.adapter import LoRASBConfig
from ..constants import FACTORS
from ..layers.lookup import layers_with, refuse_shared_basis
from . import loading

DESCRIBING = ("scaling", "lora_alpha", "init", "init_provenance", "base_fingerprint", "equivalent_gradient")


@torch.no_grad()
def swap(
    model: Any, path: str | os.PathLike[str], adapter_name: str, torch_device: str | None = None, **options: Any
) -> None:
    """Write a saved adapter's A, B and R into those of a loaded one, in place; on a ValueError nothing is changed."""
    model = uncompiled(model)
    config = LoRASBConfig.from_pretrained(str(path), **options)
    layers = layers_with(model, adapter_name)
    if not layers:
        raise ValueError(f"no layer has an adapter {adapter_name!r}: load one first, which the other one replaces")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged into the weights: call model.unmerge_adapter() first")
    refuse_shared_basis(layers, adapter_name)
    weights = {name: getattr(layer.get_base_layer(), "weight", None) for name, layer in layers.items()}
    reason = difference(weights, config.base_fingerprint) if config.check_base and config.base_fingerprint else None
    if reason:
        raise ValueError(f"{path} was made on another base model: {reason}. Hotswapping replaces adapters of one base")
    tensors = peft.load_peft_weights(str(path), device=torch_device, **options)
    tensors = loading.with_folder(tensors, str(path), options)
    tensors = loading.with_factors(tensors, adapter_name, layers, config, share=False)
    try:
        adapter_file.check_tensors(tensors, {name: layer.shapes(adapter_name) for name, layer in layers.items()})
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit the loaded adapter {adapter_name!r}, which it would replace: {error}"
        ) from None
    others = [key for key in tensors if not any(f".{part}" in key for part in FACTORS)]
    if others:
        raise ValueError(
            f"{path} has more than A, R and B ({others[0]}, ...): modules, biases or token rows that were trained in "
            "full are not swapped. Load it next to the other: model.load_adapter(path, another_name)"
        )
    for name, factors in adapter_file.group_by_layer(tensors).items():
        a, core, b = (factors[part] for part in FACTORS)
        layers[name].set_factors(adapter_name, b, core, a)
        layers[name].set_scale_as_made(adapter_name, config.scaling_for(len(core)))
        layers[name].adapters[adapter_name].equivalent = config.equivalent_gradient
    for field in DESCRIBING:  # what is saved from here on is the other adapter
        setattr(model.peft_config[adapter_name], field, getattr(config, field))
