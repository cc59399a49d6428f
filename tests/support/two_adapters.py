"""A model with two adapters that do different things."""

from __future__ import annotations

import copy
import functools

import torch
from adapters import layers
from models import batches_for, patched
from torch import nn

import lorasb


@functools.cache
def made(family: str, shared: bool, targets: tuple[str, ...] | None) -> nn.Module:
    model = patched(family)
    model.add_adapter("second", lorasb.LoRASBConfig(r=4 if shared else 3, target_modules=targets and list(targets)))
    if shared:
        for layer in layers(model).values():
            core = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.05
            layer.set_factors("second", layer.lorasb_B["default"], core, layer.lorasb_A["default"])
    else:
        lorasb.initialize(model, batches_for(family)[1:], lr=5e-2, adapter_name="second", progress=False)
    return model.eval()


def two(family: str = "llama", shared: bool = False, target_modules: tuple[str, ...] | None = None) -> nn.Module:
    """A model with two adapters that do different things; `shared`: on the same A and B."""
    return copy.deepcopy(made(family, shared, target_modules))
