"""G [N, K] (+)= dyᵀ x over tokens in their order, and on the last call the signs of G, 32 per word.

A program owns a tile of G. Its sum starts from the fp32 tile of earlier calls, goes over all tokens in order, and is
written back, or packed, or both: with only one call, and if its values are not needed, G never reaches memory. The
reduction is not split, so that the sum is in the order of the tokens.

Arguments of `grad_sign`; strides are of rows, in elements, and the last dimension is contiguous.

  inputs    dy [M, N], x [M, K]
  outputs   total [N, K] fp32: the sum, read unless FRESH, written if KEEP
            words, nonzero [N, ceil(K / 32)] int32: bit j of word w is column 32 w + j; set where G > 0, where G != 0
            counts [tiles, 3] fp32: Σ G², exact zeros, entries that are not finite; these three outputs if SIGNS
            An output that is not wanted is a dummy: any tensor at hand, neither read nor written.
  sizes     M tokens, N x K of G
  strides   stride_dy, stride_x, stride_total, stride_words (of nonzero, too)
  flags     FRESH: start from zero; KEEP: store the sum; SIGNS: store words, nonzero and counts
            EVEN: N and K are multiples of their blocks; EVEN_M: M is; together: no load is masked
            WIDE: offsets need 64 bits
            PRECISION: of tl.dot, "tf32" or "ieee"
  blocks    BLOCK_M tokens per step, BLOCK_N x BLOCK_K of G per program
            GROUP_N: row blocks that share a sweep of columns
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sizes import GemmConfig, cdiv, gradient_config
from .extended_gemm import tile_coordinates
from .launcher import Launch, launch
from .operands import needs_int64, on_device, precision, unit_rows

COUNTS = 3  # of a tile: Σ G², exact zeros, entries that are not finite


@triton.jit
def pack_bits(flags):
    """Flags [BLOCK_N, BLOCK_K] as words [BLOCK_N, BLOCK_K / 32]: bit j of a word is its column j.

    The bits of a word are disjoint, so that their sum is their exclusive or; numpy does it in one call in Triton's
    interpreter, where a generic reduction walks the elements in Python.
    """
    bits = tl.reshape(flags.to(tl.int32), (flags.shape[0], flags.shape[1] // 32, 32)) << tl.arange(0, 32)[None, None, :]
    return tl.sum(bits, axis=2)


@triton.jit
def store_signs(acc, inside, n, w, tile, outputs, sizes):
    """Store the words at rows n and words w, and the counts, of a tile; outputs: (words, nonzero, counts)."""
    words, nonzero, counts = outputs
    N, K, stride_words = sizes
    offsets = n[:, None] * stride_words + w[None, :]
    words_inside = (n < N)[:, None] & (w < tl.cdiv(K, 32))[None, :]
    tl.store(words + offsets, pack_bits((acc > 0) & inside), mask=words_inside)
    tl.store(nonzero + offsets, pack_bits((acc != 0) & inside), mask=words_inside)
    size = tl.abs(acc)
    tl.store(counts + tile * 3, tl.sum(tl.where(inside, acc * acc, 0.0)))
    tl.store(counts + tile * 3 + 1, tl.sum(tl.where(inside & (acc == 0), 1.0, 0.0)))
    not_finite = inside & ((size == float("inf")) | (acc != acc))  # Inf, or NaN: only NaN differs from itself
    tl.store(counts + tile * 3 + 2, tl.sum(tl.where(not_finite, 1.0, 0.0)))


@triton.jit(do_not_specialize=["M"])
def grad_sign(
    dy, x,  # inputs
    total, words, nonzero, counts,  # outputs
    M, N, K,  # sizes
    stride_dy, stride_x, stride_total, stride_words,  # strides
    # flags
    FRESH: tl.constexpr, KEEP: tl.constexpr, SIGNS: tl.constexpr, EVEN: tl.constexpr, EVEN_M: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,  # blocks
):  # fmt: skip
    """Compute one [BLOCK_N, BLOCK_K] tile of G. Grid: one program per tile, in bands of GROUP_N row blocks for L2."""
    tile = tl.program_id(0)
    row, column, _, _ = tile_coordinates(tile, N, (K,), BLOCK_N, BLOCK_K, GROUP_N)
    n, k = row * BLOCK_N + tl.arange(0, BLOCK_N), column * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    if WIDE:
        n = n.to(tl.int64)
    if FRESH:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    elif EVEN:
        acc = tl.load(total + n[:, None] * stride_total + k[None, :])
    else:
        acc = tl.load(total + n[:, None] * stride_total + k[None, :], mask=inside, other=0.0)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        if WIDE:
            m = m.to(tl.int64)
        left, right = dy + n[:, None] + (m * stride_dy)[None, :], x + m[:, None] * stride_x + k[None, :]
        if EVEN and EVEN_M:
            lhs, rhs = tl.load(left), tl.load(right)
        elif EVEN:
            lhs, rhs = tl.load(left, mask=(m < M)[None, :], other=0.0), tl.load(right, mask=(m < M)[:, None], other=0.0)
        else:
            lhs = tl.load(left, mask=(m < M)[None, :] & (n < N)[:, None], other=0.0)
            rhs = tl.load(right, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(lhs, rhs, acc, input_precision=PRECISION)
    if KEEP:
        if EVEN:
            tl.store(total + n[:, None] * stride_total + k[None, :], acc)
        else:
            tl.store(total + n[:, None] * stride_total + k[None, :], acc, mask=inside)
    if SIGNS:  # of the fp32 sum itself, as KEEP would store it
        w = column * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        store_signs(acc, inside, n, w, tile, (words, nonzero, counts), (N, K, stride_words))


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool, arch: str) -> None:
    """total [N, K] fp32 (+)= dyᵀ x, for dy [M, N] and x [M, K]."""
    _launch(dy, x, total, fresh, None, gradient_config(x.shape[1], x.element_size(), arch))


def gradient_signs(
    dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool, arch: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bits of G > 0 and G != 0 as words [N, ceil(K/32)], G = total + dyᵀ x; fp64 Σ G², zeros, not finite."""
    N, K = dy.shape[1], x.shape[1]
    words = x.new_empty((N, cdiv(K, 32)), dtype=torch.int32)
    nonzero, config = torch.empty_like(words), gradient_config(K, x.element_size(), arch)
    tiles = cdiv(N, config.block_m) * cdiv(K, config.block_n)
    counts = x.new_empty((tiles, COUNTS), dtype=torch.float32)
    _launch(dy, x, total, fresh, (words, nonzero, counts), config)
    return words, nonzero, counts.sum(0, dtype=torch.float64)


def _launch(
    dy: Tensor,
    x: Tensor,
    total: Tensor | None,
    fresh: bool,
    signs: tuple[Tensor, Tensor, Tensor] | None,
    config: GemmConfig,
) -> None:
    dy, x = unit_rows(dy), unit_rows(x)
    (M, N), K = dy.shape, x.shape[1]
    block_m, block_n, block_k = config.block_k, config.block_m, config.block_n  # the config names G's tile
    tiles = cdiv(N, block_n) * cdiv(K, block_k)
    if tiles == 0:
        return
    accumulator = total if total is not None else x.new_empty(1, dtype=torch.float32)
    words, nonzero, counts = signs or (accumulator.view(torch.int32), accumulator.view(torch.int32), accumulator)
    arguments = dict(
        dy=dy,
        x=x,
        total=accumulator,
        words=words,
        nonzero=nonzero,
        counts=counts,
        M=M,
        N=N,
        K=K,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        stride_total=K,
        stride_words=cdiv(K, 32),
        FRESH=fresh or total is None,
        KEEP=total is not None and (M > 0 or fresh),  # without tokens a sum changes only if it must become zero
        SIGNS=signs is not None,
        EVEN=N % block_n == 0 and K % block_k == 0,
        EVEN_M=M % block_m == 0,
        WIDE=needs_int64(dy, x, accumulator),
        PRECISION=precision(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_N=config.group,
    )
    with on_device(x):
        launch(Launch(grad_sign, tiles, arguments, config))
