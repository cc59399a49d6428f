"""Merging arithmetic: the sum of a base weight and adapters' deltas, rounded to the weight's dtype once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..utils.dtypes import SIXTEEN_BIT


def delta_weight(a: Tensor, core: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s·B R A [out, in] in R's dtype, in fp32 at least.

    A and B are widened, as a product in 16 bits would round the delta before it is added to the weight.
    """
    core = core.float() if core.dtype in SIXTEEN_BIT else core
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # a forward under it may unmerge
        return b.to(core.dtype) @ core @ a.to(core.dtype) * scaling


def merged(weight: Tensor, deltas: Sequence[Tensor], names: Sequence[str], sign: float = 1.0) -> Tensor:
    """W + sign·Σ deltas, summed in the deltas' dtype and returned in W's.

    Args:
        weight: W in its stored layout, [out, in] or [in, out].
        deltas: s·B R A of each adapter, in the same layout, fp32 or wider.
        names: of the adapters, for the error message.
        sign: 1 to merge, -1 to unmerge.

    Raises:
        ValueError: the result is not finite.
    """
    total = weight
    for delta in deltas:
        total = total + sign * delta  # type promotion widens a 16-bit W to the delta's fp32
    result = total.to(weight.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {' and '.join(names)} seems to be broken: merging gives "
            f"weights that are not finite in {weight.dtype}; the weights were left as they are. Check the adapter's "
            "training, or merge into a wider dtype"
        )
    return result
