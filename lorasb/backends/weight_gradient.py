"""Weight-gradient accumulation in plain torch, by blocks of rows of G: no temporary has the size of G."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.autocast import no_autocast
from ..utils.bit_packing import pack_words, words_of

BLOCK = 1 << 18  # elements of G per block of rows: 1 MB in fp32


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [m, n] += dyᵀ x, in total's dtype; with `fresh`, its former contents are ignored."""
    with no_autocast(x):
        left, right = dy.to(total.dtype), x.to(total.dtype)
        for rows in _row_blocks(total.shape):
            _sum_rows(left, right, total, rows, fresh)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and statistics of G = total + dyᵀ x (of dyᵀ x alone if `fresh`), which overwrites `total` [m, n] if given.

    Returns:
        The bits G > 0 and G != 0, as words [m, ceil(n / 32)] int32; and [Σ G², zeros, NaN or Inf entries] in fp64.
    """
    wide = total.dtype if total is not None else torch.float64 if x.dtype == torch.float64 else torch.float32
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    nonzero, counts = torch.empty_like(words), torch.zeros(3, dtype=torch.float64, device=x.device)
    with no_autocast(x):
        left, right = dy.to(wide), x.to(wide)
        for rows in _row_blocks((dy.shape[1], x.shape[1])):
            block = _sum_rows(left, right, total, rows, fresh)
            words[rows], nonzero[rows] = pack_words(block > 0), pack_words(block != 0)
            counts += torch.stack((_squares(block), (block == 0).sum(), (~block.isfinite()).sum())).double()
    return words, nonzero, counts


def _row_blocks(shape: tuple[int, ...] | torch.Size) -> Iterator[slice]:
    step = max(32, BLOCK // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _sum_rows(left: Tensor, right: Tensor, total: Tensor | None, rows: slice, fresh: bool) -> Tensor:
    """Some rows of G; a view of `total`, which is updated, if it is given."""
    product = left[:, rows].t() @ right if len(left) else None  # None for a batch without tokens
    if total is None:
        return product if product is not None else left.new_zeros((left[:, rows].shape[1], right.shape[1]))
    block = total[rows]
    if fresh:
        return block.zero_() if product is None else block.copy_(product)
    return block if product is None else block.add_(product)


def _squares(block: Tensor) -> Tensor:
    """Σ G² of a block, summed in fp64 without an fp64 copy of it."""
    return torch.linalg.vector_norm(block, dtype=torch.float64).square()
