"""The bare base model while gradients are taken, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...layers.linear import LoRASBLinear

ASKS_FOR_MORE = ("use_cache", "output_hidden_states", "output_attentions")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache, adapters off, nothing requires a gradient; all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    disabled = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, LoRASBLinear)]
    settings = _settings(model)
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer, _ in disabled:
            layer._disable_adapters = True
        for config, name, _ in settings:
            setattr(config, name, False)
        with torch.enable_grad():
            yield
    finally:
        for config, name, value in settings:
            setattr(config, name, value)
        for layer, state in disabled:
            layer._disable_adapters = state
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _settings(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """What configs ask for beside the loss and is on: it would corrupt a recomputation, or cost memory for nothing."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [(c, name, True) for c in configs.values() for name in ASKS_FOR_MORE if vars(c).get(name) is True]
