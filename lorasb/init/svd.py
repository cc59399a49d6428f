"""Truncated SVD of a gradient or its signs: randomized subspace iteration with a separate generator.

The matrix is dense or a `SignBits`, which is unpacked to ±1 in blocks of columns (or rows), so that the dense matrix
never exists. Accuracy is measured by captured energy, not by angles: neighboring singular values nearly
coincide, so their vectors are not determined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.registry import WORD, unpack_words, words_of
from ..utils.precision import double


@dataclass(frozen=True)
class SignBits:
    """sign(G) [m, n] packed into 32-bit words: 1/32 of G's size in fp32, or 1/16 if G has exact zeros."""

    words: Tensor  # [m, ceil(n / 32)] int32; bit j of word w of a row is 1 if column 32·w + j is positive
    shape: tuple[int, int]  # (m, n)
    nonzero: Tensor | None = None  # [m, ceil(n / 32)] int32, bits of nonzero entries; None if no entry is zero

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The signs [m, n] as +1, -1 and 0."""
        return self.block(slice(0, self.shape[0]), slice(0, self.shape[1]), dtype)

    def block(self, rows: slice, columns: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The signs of a block of rows and columns; `columns` starts at a multiple of 32, the word size."""
        count = min(columns.stop, self.shape[1]) - columns.start
        words = slice(columns.start // WORD, columns.start // WORD + words_of(count))
        signs = unpack_words(self.words[rows, words], count, -1.0, 1.0, dtype)
        if self.nonzero is not None:  # zeros were unpacked as -1
            signs = signs * unpack_words(self.nonzero[rows, words], count, 0.0, 1.0, dtype)
        return signs

    def to(self, device: torch.device | str) -> SignBits:
        """Copy to a device."""
        return SignBits(self.words.to(device), self.shape, None if self.nonzero is None else self.nonzero.to(device))


OVERSAMPLE = 32  # q = r + 32 captures >= 99.99% of the optimal energy on real gradients, q = r 99.7-99.9% (measured)
ITERATIONS = 10  # subspace iterations after the first product; measured together with OVERSAMPLE
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
    """Compute in true fp32: without the caller's autocast, and without TF32 or bf16 inside fp32 products."""
    with ExitStack() as restored, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            restored.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield


def truncated_svd(matrix: Matrix, r: int, seed: int) -> Triplets:
    """The leading r singular triplets: matrix ≈ U diag(S) Vᵀ. See `leading_triplets`."""
    return leading_triplets(matrix, r, seed).first(r)


@torch.no_grad()
def leading_triplets(matrix: Matrix, r: int, seed: int) -> Triplets:
    """The leading r singular triplets, followed by up to 32 less accurate ones.

    Subspace iteration on a matrix [m, n] in fp32 or fp64, or on its signs, with q = r + 32 columns; an exact SVD if
    q >= min(m, n). Signs are fixed (the largest entry of each column of U is positive), so equal input gives equal
    output. `seed` draws the starting basis; the global random state is not touched.
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
    signs = _column_signs(u)
    return Triplets(u * signs, s, vt * signs.t())


def _column_signs(columns: Tensor) -> Tensor:
    """Signs [1, q] that make the largest entry of each column positive; 1 for a column of zeros."""
    signs = torch.sign(columns.gather(0, columns.abs().argmax(0, keepdim=True)))
    return torch.where(signs == 0, 1, signs)


def signed_core(matrix: Matrix, triplets: Triplets) -> Tensor:
    """Uᵀ M V [q, q] for U and V of `triplets`, without unpacking all of M at once."""
    m, n = matrix.shape
    short, long = (triplets.u, triplets.vt.t()) if m <= n else (triplets.vt.t(), triplets.u)
    # Blocks run along the long side, so V or U is sliced, whichever is on that side.
    core = triplets.u.new_zeros(short.shape[1], long.shape[1])
    for columns, block in _wide_blocks(matrix):
        core += short.t() @ block.to(short.dtype) @ long[columns]
    return core if m <= n else core.t()


def energies(core: Tensor) -> Tensor:
    """‖C[:k, :k]‖² for k = 1 ... q of C = Uᵀ M V [q, q]."""
    return double(core).square().cumsum(0).cumsum(1).diagonal()


def _randomized(matrix: Matrix, q: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q triplets U [s, q], S [q], Vᵀ [q, l] of W [s, l], s <= l, the matrix or (if tall) its transpose."""
    # Subspace iteration on W Wᵀ [s, s]: its basis is on the short side, where QR is smallest.
    short, length = sorted(matrix.shape)
    source = matrix.words if isinstance(matrix, SignBits) else matrix
    dtype = torch.float32 if isinstance(matrix, SignBits) else matrix.dtype
    # Drawn on the CPU: one seed gives the same start on every device.
    basis = torch.randn(short, q, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu").to(
        source.device
    )
    gram = None
    # Form W Wᵀ if it and [s, s] products take fewer multiplications (here divided by s) than two [s, l] products per
    # iteration; exact for signs, whose products are integers (below 2^24 in fp32).
    if short * length + ITERATIONS * short * q < 2 * ITERATIONS * length * q:
        gram = basis.new_zeros(short, short)
        for _, block in _wide_blocks(matrix):
            gram.addmm_(block, block.t())
    # QR in every iteration: without it all columns would converge to the leading singular vector.
    for _ in range(ITERATIONS + 1):
        if gram is not None:
            product = gram @ basis
        else:
            product = torch.zeros_like(basis)
            for _, block in _wide_blocks(matrix):
                product.addmm_(block, block.t() @ basis)
        basis = torch.linalg.qr(product).Q
    # Rayleigh-Ritz: the SVD of the small projection Qᵀ W [q, l] gives singular values and both bases.
    projected = basis.new_empty(q, length)
    for columns, block in _wide_blocks(matrix):
        projected[:, columns] = basis.t() @ block
    left, s, vt = torch.linalg.svd(projected, full_matrices=False)
    return basis @ left, s, vt


def _wide_blocks(matrix: Matrix) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of columns of W [s, l] (the matrix, transposed if tall) with their slice; if dense, one block."""
    m, n = matrix.shape
    if not isinstance(matrix, SignBits):
        yield slice(0, max(m, n)), matrix if m <= n else matrix.t()
        return
    step = max(32, BLOCK // min(m, n) // 32 * 32)  # blocks of columns have to start at a word boundary
    for start in range(0, max(m, n), step):
        columns = slice(start, min(start + step, max(m, n)))
        if m <= n:
            yield columns, matrix.block(slice(0, m), columns)
        else:
            yield columns, matrix.block(columns, slice(0, n)).t()


class MomentSketch:
    """Sums of g_i g_iᵀ Ω [out, q] and g_iᵀ g_i Ω' [in, q] over samples in fp32, for leading eigenvectors at rank r."""

    def __init__(self, shape: tuple[int, int], r: int, seed: int) -> None:
        q = min(r + OVERSAMPLE, *shape)
        # drawn on the CPU: the same on every device and rank
        generator = torch.Generator().manual_seed(seed)
        self._starts = [torch.randn(side, q, generator=generator, dtype=torch.float32, device="cpu") for side in shape]
        self.sums = [torch.zeros(side, q, dtype=torch.float32) for side in shape]

    def to(self, device: torch.device) -> None:
        """Move to a device, in place."""
        self._starts = [start.to(device) for start in self._starts]
        self.sums = [total.to(device) for total in self.sums]

    @torch.no_grad()
    def add(self, dy: Tensor, x: Tensor) -> None:
        """Add samples: dy [b, ..., out] and x [b, ..., in], one sample per row of the first dimension."""
        # In two dimensions, [tokens, out], all tokens count as one sample: modules that get flattened rows (OPT's
        # fc1, experts) do not know where one sample ends. A layer that runs twice in a forward adds two samples.
        self.to(dy.device)
        samples = dy.shape[0] if dy.dim() > 2 else 1
        dy, x = (part.reshape(samples, -1, part.shape[-1]).float() for part in (dy, x))
        with full_precision():
            for i, (left, right) in enumerate(((dy, x), (x, dy))):
                # g gᵀ Ω = dyᵀ (x (xᵀ (dy Ω))), from the right to the left
                thin = right @ (right.transpose(1, 2) @ (left @ self._starts[i]))
                self.sums[i].addmm_(left.flatten(0, 1).t(), thin.flatten(0, 1))

    def triplets(self) -> Triplets:
        """Eigenvectors U [out, q] and Vᵀ [q, in] of both moments by descending eigenvalue, and U's √eigenvalues [q]."""
        # U and V are paired only by order: U_kᵀ G V_k is not diagonal.
        (u, values), (v, _) = (leading_eigenvectors(*pair) for pair in zip(self.sums, self._starts, strict=True))
        return Triplets(u, values.clamp(min=0).sqrt(), v.t().contiguous())


def leading_eigenvectors(sketch: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal eigenvectors [n, q] and descending eigenvalues [q] of a PSD M, from M Ω and Ω [n, q]."""
    # Nyström with a shift (Tropp et al. 2017, Algorithm 3): M ≈ (M Ω) (Ωᵀ M Ω)⁺ (M Ω)ᵀ. Columns beyond M's rank
    # complete the basis.
    wide, omega = double(sketch), double(start)
    shift = torch.finfo(torch.float32).eps * wide.norm() + torch.finfo(torch.float64).tiny
    wide = wide + shift * omega
    middle = omega.t() @ wide
    values, vectors = torch.linalg.eigh((middle + middle.t()) / 2)
    root = wide @ (vectors / values.clamp(min=float(values[-1]) * 1e-12).sqrt())  # M ≈ root · rootᵀ
    # the small Gram matrix: an SVD of [n, q] in fp64 would take most of the time
    values, vectors = torch.linalg.eigh(root.t() @ root)
    values, vectors = values.flip(0), vectors.flip(1)
    basis = torch.linalg.qr(root @ (vectors / values.clamp(min=float(values[0]) * 1e-12).sqrt())).Q.float()
    return basis * _column_signs(basis), (values - shift).float()  # eigenvectors are unique up to a sign
