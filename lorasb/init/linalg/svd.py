"""Truncated SVD of a gradient or its signs: randomized, seeded, and judged by the energy it captures.

The matrix comes dense or as `SignBits`, which are unpacked to ±1 some columns (or rows) at a time: the whole of it
never exists beside its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .sign_bits import SignBits

OVERSAMPLE = 32  # q = r + 32: captures >= 99.99% of the optimal energy on real gradients where q = r had 99.7-99.9%
ITERATIONS = 10
BLOCK = 1 << 20  # entries unpacked at a time: 4 MB in fp32

Matrix = Tensor | SignBits


class Triplets(NamedTuple):
    """U [m, q], S [q] in descending order and Vᵀ [q, n]."""

    u: Tensor
    s: Tensor
    vt: Tensor

    def first(self, r: int) -> Triplets:
        """The leading r."""
        return Triplets(self.u[:, :r].contiguous(), self.s[:r].contiguous(), self.vt[:r].contiguous())


@contextmanager
def full_precision() -> Iterator[None]:
    """Without the caller's autocast, which would take products of factors in 16 bits."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def truncated_svd(matrix: Matrix, r: int, seed: int) -> Triplets:
    """The leading r singular triplets: matrix ≈ U diag(S) Vᵀ. See `leading_triplets`."""
    return leading_triplets(matrix, r, seed).first(r)


@torch.no_grad()
def leading_triplets(matrix: Matrix, r: int, seed: int) -> Triplets:
    """The leading r singular triplets, and up to 32 less exact ones behind them.

    Subspace iteration with q = r + 32 columns from a generator of its own; exact where q reaches min(m, n). Signs are
    fixed (the largest entry of each column of U is positive), so equal input gives equal output.

    Args:
        matrix: [m, n], fp32 or fp64, or the signs of one.
        r: how many, at most min(m, n).
        seed: of the start. The global random state is not touched.

    Returns:
        q triplets, at most min(m, n).
    """
    m, n = matrix.shape
    q = r + OVERSAMPLE
    if q >= min(m, n):
        dense = matrix.unpack() if isinstance(matrix, SignBits) else matrix
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    else:
        short, s, long = _randomized(matrix, q, seed)
        u, vt = (short, long) if m <= n else (long.t(), short.t())
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    signs[signs == 0] = 1
    return Triplets(u * signs, s, vt * signs.t())


def signed_core(matrix: Matrix, triplets: Triplets) -> Tensor:
    """Uᵀ M V [q, q]."""
    m, n = matrix.shape
    short, long = (triplets.u, triplets.vt.t()) if m <= n else (triplets.vt.t(), triplets.u)
    core = triplets.u.new_zeros(short.shape[1], long.shape[1])
    for place, block in _wide_blocks(matrix):
        core += short.t() @ block.to(short.dtype) @ long[place]
    return core if m <= n else core.t()


def energies(core: Tensor) -> Tensor:
    """‖C[:k, :k]‖² for k = 1 ... q of C = Uᵀ M V [q, q]."""
    return core.double().square().cumsum(0).cumsum(1).diagonal()


def _randomized(matrix: Matrix, q: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q triplets of the matrix [s, l], s <= l: its transpose where it is tall. Each step multiplies by W Wᵀ."""
    short, length = sorted(matrix.shape)
    like = matrix.words if isinstance(matrix, SignBits) else matrix
    dtype = torch.float32 if isinstance(matrix, SignBits) else matrix.dtype
    start = torch.randn(short, q, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    basis = start.to(like.device)
    gram = _gram(matrix, basis) if _gram_is_cheaper(short, length, q) else None
    for _ in range(ITERATIONS + 1):
        basis = torch.linalg.qr(gram @ basis if gram is not None else _square_times(matrix, basis)).Q
    projected = basis.new_empty(q, length)
    for place, block in _wide_blocks(matrix):
        projected[:, place] = basis.t() @ block
    left, s, vt = torch.linalg.svd(projected, full_matrices=False)
    return basis @ left, s, vt


def _gram_is_cheaper(short: int, length: int, q: int) -> bool:
    """By multiplications: W Wᵀ once and then small products, or two thin products a step."""
    return short * length + ITERATIONS * short * q < 2 * ITERATIONS * length * q


def _gram(matrix: Matrix, like: Tensor) -> Tensor:
    """W Wᵀ [s, s]; of signs in whole numbers, so exactly."""
    short = min(matrix.shape)
    gram = like.new_zeros(short, short)
    for _, block in _wide_blocks(matrix):
        gram.addmm_(block, block.t())
    return gram


def _square_times(matrix: Matrix, basis: Tensor) -> Tensor:
    """W Wᵀ · basis without W Wᵀ."""
    total = torch.zeros_like(basis)
    for _, block in _wide_blocks(matrix):
        total.addmm_(block, block.t() @ basis)
    return total


def _wide_blocks(matrix: Matrix) -> Iterator[tuple[slice, Tensor]]:
    """The matrix [s, l], transposed where it is tall, in blocks of its long side."""
    m, n = matrix.shape
    if not isinstance(matrix, SignBits):
        yield slice(0, max(m, n)), matrix if m <= n else matrix.t()
        return
    step = max(32, BLOCK // min(m, n) // 32 * 32)
    for start in range(0, max(m, n), step):
        place = slice(start, min(start + step, max(m, n)))
        if m <= n:
            yield place, matrix.block(slice(0, m), place)
        else:
            yield place, matrix.block(place, slice(0, n)).t()
