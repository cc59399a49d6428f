"""A few values of the base model, kept with an adapter: enough to tell its base from any other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VALUES = 16
TOLERANCE = 2.0**-8  # rounding a weight to bf16 moves it by at most 2^-9 of its size
SMALLEST = 2.0**-24  # the step of fp16 near zero


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Sixteen values of the first, middle and last weight, by layer name; None where they cannot be read."""
    names = list(weights)
    chosen = {names[i]: weights[names[i]] for i in (0, len(names) // 2, len(names) - 1)} if names else {}
    if not chosen or not all(_readable(weight) for weight in chosen.values()):
        return None
    return {name: " ".join(f"{value:.7g}" for value in _sample(weight)) for name, weight in chosen.items()}


def difference(weights: Mapping[str, Tensor], expected: Mapping[str, str]) -> str | None:
    """What tells these weights from those whose fingerprint is `expected`; None where they agree or are unreadable.

    A base in another precision is the same base: values may differ by a rounding to bf16.
    """
    for name, text in expected.items():
        values, weight = [float(value) for value in text.split()], weights.get(name)
        if weight is None:
            return f"it has no adapted layer {name!r}"
        if not _readable(weight):
            return None
        off = sum(abs(a - b) > TOLERANCE * abs(b) + SMALLEST for a, b in zip(_sample(weight), values, strict=True))
        if off:
            return f"{off} of {len(values)} sampled weights of {name!r} differ"
    return None


def _readable(weight: Tensor) -> bool:
    if hasattr(weight, "quant_state"):
        return False
    return not weight.is_meta and type(weight.data) is Tensor and weight.is_floating_point() and weight.numel() > 0


@torch.no_grad()
def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long().to(flat.device)
    values: list[float] = flat[index].double().tolist()
    return values
