"""A fingerprint of the base model, saved with an adapter: a few sampled weights that identify the base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

VALUES = 16  # per sampled layer
TOLERANCE = 2.0**-8  # relative; rounding to bf16 changes a weight by at most 2^-9 of it
SMALLEST = 2.0**-24  # absolute; the spacing of fp16 numbers near zero


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Sixteen values of the first, middle and last weight, by layer name; None if one of them cannot be read."""
    names = list(weights)
    chosen = {names[i]: weights[names[i]] for i in (0, len(names) // 2, len(names) - 1)} if names else {}
    if not chosen or not all(_readable(weight) for weight in chosen.values()):
        return None
    return {name: " ".join(f"{value:.7g}" for value in _sample(weight)) for name, weight in chosen.items()}


def difference(weights: Mapping[str, Tensor | None], expected: Mapping[str, str]) -> str | None:
    """How these weights differ from a fingerprint's by more than a rounding to bf16; None if they do not."""
    for name, text in expected.items():
        if name not in weights:
            return f"it has no adapted layer {name!r}"
        values, weight = [float(value) for value in text.split()], weights[name]
        if weight is None or not _readable(weight):  # counts as equal
            return None
        num_different = sum(
            abs(a - b) > TOLERANCE * abs(b) + SMALLEST for a, b in zip(_sample(weight), values, strict=True)
        )
        if num_different:
            return f"{num_different} of {len(values)} sampled weights of {name!r} differ"
    return None


def _readable(weight: Tensor) -> bool:
    """True for a plain dense tensor with values: not quantized, sharded, offloaded or empty (ZeRO-3)."""
    if hasattr(weight, "quant_state"):
        return False
    return not weight.is_meta and type(weight.data) is Tensor and weight.is_floating_point() and weight.numel() > 0


@torch.no_grad()
def _sample(weight: Tensor) -> list[float]:
    """Evenly spaced values of the flattened weight, its first and last included."""
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long().to(flat.device)
    values: list[float] = flat[index].double().tolist()
    return values
