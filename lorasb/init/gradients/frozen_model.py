"""A context in which the model is frozen and in evaluation mode, as gradients are taken at the base weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...layers.linear import LoRASBLinear

EXTRA_OUTPUTS = ("use_cache", "output_hidden_states", "output_attentions")


@contextmanager
def frozen_base(model: nn.Module, beside: Sequence[str] = ()) -> Iterator[None]:
    """Evaluation mode, adapters disabled but for those named, no KV cache, no gradients; restored on exit."""
    # The state of each module and parameter, as users may have put some blocks into another mode, or froze some.
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = [(m, m._disable_adapters, m._active_adapter) for m in model.modules() if isinstance(m, LoRASBLinear)]
    settings = _extra_outputs(model)
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)  # gradients come from hooks: no weight may get a `.grad`
        for layer, _, _ in states:
            layer._disable_adapters, layer._active_adapter = not beside, list(beside) or layer._active_adapter
        for config, name, _ in settings:
            setattr(config, name, False)
        with torch.enable_grad():  # the caller may be under no_grad
            yield
    finally:
        for config, name, value in settings:
            setattr(config, name, value)
        for layer, off, active in states:
            layer._disable_adapters, layer._active_adapter = off, active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _extra_outputs(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """(config, name, True) of every output beside the loss that is switched on in a config of the model.

    A KV cache would grow at every recomputation of a block, which then attends to its own keys twice; hidden states and
    attentions only take memory.
    """
    # By id: submodules share config objects, and one entry for each is enough.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [(c, name, True) for c in configs.values() for name in EXTRA_OUTPUTS if vars(c).get(name) is True]
