"""A few values of the base model, kept with an adapter: enough to tell its base from any other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import LoRASBLinear

LAYERS = 3
VALUES = 16
TOLERANCE = 2.0**-8  # rounding a weight to bf16 moves it by at most 2^-9 of its size


def fingerprint(model: nn.Module) -> dict[str, str] | None:
    """Sixteen weights of the first, middle and last adapted layer, by layer name; None where they cannot be read."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRASBLinear)]
    if not layers or any(module.merged for _, module in layers):
        return None
    chosen = {layers[i][0]: layers[i][1] for i in (0, len(layers) // 2, len(layers) - 1)}
    values = {}
    for name, module in chosen.items():
        weight = module.base_weight()
        if weight.is_meta or type(weight.data) is not Tensor or weight.numel() == 0:
            return None
        values[_plain(name)] = " ".join(f"{value:.7g}" for value in _sample(weight))
    return values


def difference(model: nn.Module, expected: dict[str, str]) -> str | None:
    """What tells `model` from the base whose fingerprint is `expected`; None where it is the same or unreadable.

    A base in another precision is the same base: values may differ by a rounding to bf16.
    """
    modules = {_plain(name): module for name, module in model.named_modules()}
    for name, text in expected.items():
        values = [float(value) for value in text.split()]
        module = modules.get(name)
        if module is None:
            return f"it has no layer {name!r}"
        weight = module.base_weight() if isinstance(module, LoRASBLinear) else getattr(module, "weight", None)
        if (
            not isinstance(weight, Tensor)
            or weight.is_meta
            or type(weight.data) is not Tensor
            or not weight.is_floating_point()
        ):
            return None
        there = _sample(weight)
        off = [
            i for i, (a, b) in enumerate(zip(there, values, strict=False)) if abs(a - b) > TOLERANCE * abs(b) + 1e-12
        ]
        if off:
            return f"{len(off)} of {len(values)} sampled weights of {name!r} differ"
    return None


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


@torch.no_grad()
def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long().to(flat.device)
    values: list[float] = flat[index].double().tolist()
    return values
