"""The sum of a base weight and adapters' deltas, rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merged(weight: Tensor, deltas: Sequence[Tensor], names: Sequence[str], sign: float = 1.0) -> Tensor:
    """W + sign·Σ deltas at the deltas' own precision, in W's dtype.

    Args:
        weight: W as it is stored.
        deltas: of the same shape, fp32 or wider.
        names: of the adapters, for the error.
        sign: 1 to merge, -1 to take out.

    Raises:
        ValueError: the result is not finite.
    """
    total = weight
    for delta in deltas:
        total = total + sign * delta
    result = total.to(weight.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"merging adapters {list(names)} gives weights that are not finite in {weight.dtype}; the weights were "
            "left as they are. Check the adapter's training, or merge into a wider dtype"
        )
    return result
