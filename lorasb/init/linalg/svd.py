"""Truncated SVD of a gradient or its signs: randomized subspace iteration with a generator of its own.

The matrix is dense or a `SignBits`, which is unpacked to ±1 in blocks of columns (or rows), so that the dense matrix
never exists. Accuracy is judged by captured energy, not by angles: neighboring singular values are near ties, whose
vectors are not determined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sign_bits import SignBits

OVERSAMPLE = 32  # q = r + 32 captures >= 99.99% of the optimal energy on real gradients, q = r 99.7-99.9% (measured)
ITERATIONS = 10  # of the subspace iteration, after the first product; measured together with OVERSAMPLE
BLOCK = 1 << 20  # entries unpacked at a time: 4 MB in fp32

Matrix = Tensor | SignBits


class Triplets(NamedTuple):
    """Singular triplets: U [m, q], S [q] in descending order and Vᵀ [q, n]."""

    u: Tensor
    s: Tensor
    vt: Tensor

    def first(self, r: int) -> Triplets:
        """The leading r triplets, contiguous."""
        return Triplets(self.u[:, :r].contiguous(), self.s[:r].contiguous(), self.vt[:r].contiguous())


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in fp32 as it is: without the caller's autocast, TF32 or bf16 inside fp32 products."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    backends = [one for one in backends if hasattr(one, "fp32_precision")]  # torch 2.9 on
    kept = [one.fp32_precision for one in backends]
    try:
        for one in backends:
            one.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for one, precision in zip(backends, kept, strict=True):
            one.fp32_precision = precision


def truncated_svd(matrix: Matrix, r: int, seed: int) -> Triplets:
    """The leading r singular triplets: matrix ≈ U diag(S) Vᵀ. See `leading_triplets`."""
    return leading_triplets(matrix, r, seed).first(r)


@torch.no_grad()
def leading_triplets(matrix: Matrix, r: int, seed: int) -> Triplets:
    """The leading r singular triplets, followed by up to 32 less accurate ones.

    Subspace iteration with q = r + 32 columns; an exact SVD if q >= min(m, n). Signs are fixed (the largest entry of
    each column of U is positive), so equal input gives equal output.

    Args:
        matrix: [m, n], fp32 or fp64, or the signs of one.
        r: number of accurate triplets, at most min(m, n).
        seed: seed of the start basis. The global random state is not touched.

    Returns:
        min(q, m, n) triplets.
    """
    m, n = matrix.shape
    q = r + OVERSAMPLE
    if q >= min(m, n):  # the projection would be no smaller than the matrix
        dense = matrix.unpack() if isinstance(matrix, SignBits) else matrix
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    else:
        short, s, long = _randomized(matrix, q, seed)
        u, vt = (short, long) if m <= n else (long.t(), short.t())
    # Singular vectors are unique up to a common sign of u_k and v_k, which LAPACK and cuSOLVER choose differently.
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    signs[signs == 0] = 1  # a column of zeros, of a matrix of lower rank
    return Triplets(u * signs, s, vt * signs.t())


def signed_core(matrix: Matrix, triplets: Triplets) -> Tensor:
    """Uᵀ M V [q, q] for U, V of `triplets`, without unpacking M at once."""
    m, n = matrix.shape
    short, long = (triplets.u, triplets.vt.t()) if m <= n else (triplets.vt.t(), triplets.u)
    # Blocks run along the long side, so V or U is sliced, whichever is on that side.
    core = triplets.u.new_zeros(short.shape[1], long.shape[1])
    for columns, block in _wide_blocks(matrix):
        core += short.t() @ block.to(short.dtype) @ long[columns]
    return core if m <= n else core.t()


def energies(core: Tensor) -> Tensor:
    """‖C[:k, :k]‖² for k = 1 ... q of C = Uᵀ M V [q, q]."""
    return core.double().square().cumsum(0).cumsum(1).diagonal()


def _randomized(matrix: Matrix, q: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q triplets (U [s, q], S [q], Vᵀ [q, l]) of W [s, l], s <= l, which is the matrix, or its transpose if it is tall.

    Subspace iteration on W Wᵀ [s, s], whose basis lies on the short side: the smallest QR.
    """
    short, length = sorted(matrix.shape)
    source = matrix.words if isinstance(matrix, SignBits) else matrix
    dtype = torch.float32 if isinstance(matrix, SignBits) else matrix.dtype
    # Drawn on the CPU: one seed gives the same start on every device.
    start = torch.randn(short, q, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    basis = start.to(source.device)
    gram = _gram(matrix, basis) if _gram_is_cheaper(short, length, q) else None
    # QR in every iteration: without it all columns would converge to the leading singular vector.
    for _ in range(ITERATIONS + 1):
        basis = torch.linalg.qr(gram @ basis if gram is not None else _gram_times(matrix, basis)).Q
    # Rayleigh-Ritz: the SVD of the small projection Qᵀ W [q, l] gives singular values and both bases.
    left, s, vt = torch.linalg.svd(_projected(matrix, basis, length), full_matrices=False)
    return basis @ left, s, vt


def _projected(matrix: Matrix, basis: Tensor, length: int) -> Tensor:
    """Qᵀ W [q, l], a block of columns at a time."""
    projected = basis.new_empty(basis.shape[1], length)
    for columns, block in _wide_blocks(matrix):
        projected[:, columns] = basis.t() @ block
    return projected


def _gram_is_cheaper(short: int, length: int, q: int) -> bool:
    """True if W Wᵀ once and [s, s] products take fewer multiplications than two [s, l] products per iteration.

    Both counts are divided by s.
    """
    return short * length + ITERATIONS * short * q < 2 * ITERATIONS * length * q


def _gram(matrix: Matrix, like: Tensor) -> Tensor:
    """W Wᵀ [s, s]; exact for signs, whose products are integers (below 2^24 in fp32)."""
    short = min(matrix.shape)
    gram = like.new_zeros(short, short)
    for _, block in _wide_blocks(matrix):
        gram.addmm_(block, block.t())
    return gram


def _gram_times(matrix: Matrix, basis: Tensor) -> Tensor:
    """W (Wᵀ · basis) [s, q], without W Wᵀ."""
    total = torch.zeros_like(basis)
    for _, block in _wide_blocks(matrix):
        total.addmm_(block, block.t() @ basis)
    return total


def _wide_blocks(matrix: Matrix) -> Iterator[tuple[slice, Tensor]]:
    """The columns of W [s, l] (the matrix, transposed if it is tall) in blocks, with their slice; dense: one block."""
    m, n = matrix.shape
    if not isinstance(matrix, SignBits):
        yield slice(0, max(m, n)), matrix if m <= n else matrix.t()
        return
    step = max(32, BLOCK // min(m, n) // 32 * 32)  # blocks of columns have to start at a word
    for start in range(0, max(m, n), step):
        columns = slice(start, min(start + step, max(m, n)))
        if m <= n:
            yield columns, matrix.block(slice(0, m), columns)
        else:
            yield columns, matrix.block(columns, slice(0, n)).t()
