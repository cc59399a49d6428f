"""Gradient sums in plain torch: some rows of G at a time, so that nothing beside G has its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.registry import register_backend
from ...utils.bit_packing import pack_words, words_of
from .linear import no_autocast

BLOCK = 1 << 18  # elements of G at a time: 1 MB in fp32


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [m, n] (+)= dyᵀ x, in total's dtype."""
    with no_autocast(x):
        left, right = dy.to(total.dtype), x.to(total.dtype)
        for rows in _row_blocks(total.shape):
            _sum_rows(left, right, total, rows, fresh)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The signs of total + dyᵀ x and its nonzero places as words [m, ceil(n/32)]; and Σ G², zeros, not finite.

    total gets the sum; without one, the sum exists some rows at a time.
    """
    wide = total.dtype if total is not None else torch.float64 if x.dtype == torch.float64 else torch.float32
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    nonzero, counts = torch.empty_like(words), torch.zeros(3, dtype=torch.float64, device=x.device)
    with no_autocast(x):
        left, right = dy.to(wide), x.to(wide)
        for rows in _row_blocks((dy.shape[1], x.shape[1])):
            part = _sum_rows(left, right, total, rows, fresh)
            words[rows], nonzero[rows] = pack_words(part > 0), pack_words(part != 0)
            counts += torch.stack((_squares(part), (part == 0).sum(), (~part.isfinite()).sum())).double()
    return words, nonzero, counts


def _row_blocks(shape: tuple[int, ...] | torch.Size) -> Iterator[slice]:
    step = max(32, BLOCK // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _sum_rows(left: Tensor, right: Tensor, total: Tensor | None, rows: slice, fresh: bool) -> Tensor:
    part = left[:, rows].t() @ right if len(left) else None
    if total is None:
        return part if part is not None else left.new_zeros((left[:, rows].shape[1], right.shape[1]))
    block = total[rows]
    if fresh:
        return block.zero_() if part is None else block.copy_(part)
    return block if part is None else block.add_(part)


def _squares(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part, dtype=torch.float64).square()


def register() -> None:
    """Register for every device."""
    kernels = (("gradient_add", gradient_add), ("gradient_signs", gradient_signs))
    register_backend("eager", kernels, ("CompositeExplicitAutograd",))
