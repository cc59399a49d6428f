"""A part of the rank that is left empty at first, to be filled from a later gradient.

Its columns of B and rows of A are zeros: they add nothing to W, R's entries that belong to them get no gradient and
stay zero, and so do an optimizer's moments. Factors of SVDs have no column of zeros, so that a file says by itself what
is held back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers.linear import LoRASBLinear
from .methods import Factors


def held(layer: LoRASBLinear, adapter: str) -> int:
    """How many of an adapter's r directions, the last ones, are held back in a layer."""
    empty = (layer.lorasb_B[adapter] == 0).all(0)
    return int(empty.flip(0).long().cumprod(0).sum())


def emptied(factors: Factors, share: float) -> Factors:
    """B, R and A without their last directions, a share of r; one stays at least."""
    if not share:
        return factors
    b, core, a, sigma = factors
    kept = torch.arange(len(core), device=core.device) < max(1, len(core) - int(share * len(core)))
    return Factors(b * kept, core * kept * kept[:, None], a * kept[:, None], sigma)


@torch.no_grad()
def filled(layer: LoRASBLinear, adapter: str, later: str) -> tuple[Tensor, Tensor]:
    """An adapter's B [out, r] and A [r, in] with the directions of another one's B R A where they were held back.

    Of the columns of B R and the rows of R A, what is orthogonal to those that the adapter has: the leading singular
    vectors, as long as the adapter's own are in the mean.
    """
    count = held(layer, adapter)
    own_b, own_a = layer.lorasb_B[adapter].double(), layer.lorasb_A[adapter].double()
    b, core, a = (getattr(layer, f"lorasb_{name}")[later].double() for name in "BRA")
    if not core.any():  # of a layer that no sample reaches
        core = torch.eye(len(core), dtype=core.dtype, device=core.device)
    kept = len(core) - count
    left = _outside(own_b[:, :kept], b @ core, count)
    right = _outside(own_a[:kept].t(), (core @ a).t(), count)
    return torch.cat([own_b[:, :kept], left], 1), torch.cat([own_a[:kept], right.t()], 0)


def _outside(known: Tensor, found: Tensor, count: int) -> Tensor:
    """The `count` leading directions of columns [n, r] outside of those known [n, k], of the known ones' length."""
    basis = torch.linalg.qr(known).Q
    rest = found - basis @ (basis.t() @ found)
    leading = torch.linalg.svd(rest, full_matrices=False).U[:, :count]
    # Once more by QR: directions of no length, where fewer were found than are held back, may lie inside.
    new = torch.linalg.qr(torch.cat([basis, leading], 1)).Q[:, known.shape[1] :]
    return new * known.square().sum(0).mean().sqrt()
