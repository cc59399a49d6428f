"""A GEMM over a 4-bit weight that dequantizes in its K loop, for few rows: no dense W is written or read.

Arguments of `quantized_gemm`; strides are of rows, in elements, and the last dimension is contiguous.

                     forward                            backward
  operands           x [M, K]                           x: dy [M, N]
                     v [M, R]                           v: w [M, R]
                     factor: B [N, R]                   factor: A [R, K]
                     bias [N], or None                  bias: None
  output             y [M, N]                           y: dx [M, K]
  quantized weight   packed ... nested_offset: W [N, K] with K even, see dequantize_4bit
  workspace          partial: fp32 tiles of each split, used if SPLIT
                     counters: int32, one a tile, zero between launches
  sizes              M rows, W's N and K
  strides            stride_x, stride_v, stride_factor, stride_y
  flags              BACKWARD; WIDE: offsets need 64 bits; PRECISION: of tl.dot, "tf32" or "ieee"
  rank               R
  blocks             BLOCK_M x BLOCK_N of y a program, BLOCK_K of the reduction a step
                     SPLIT: `splits` programs share a tile
  storage            QUANT_BLOCK, NESTED_BLOCK, ROUNDING: see dequantize_4bit
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize_4bit import Storage, block_scales, unpack
from .device_functions import arrives_last, block_offsets, ordered_sum
from .extended_gemm import accumulate


@triton.jit
def weight_tile(rows, pairs, weight, N, K, storage, WIDE: tl.constexpr):
    """W [rows, 2·pairs] in fp32, of W [N, K] with K even; elements outside are 0.

    A pair is a packed byte: with K even, none straddles two rows. weight: as in `dequantize_bytes`.
    """
    packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset = weight
    nested = (nested_absmax, nested_codebook, nested_offset)
    inside = (rows < N)[:, None] & (2 * pairs < K)[None, :]
    offsets = (rows.to(tl.int64) if WIDE else rows)[:, None] * (K // 2) + pairs[None, :]
    scale = block_scales(2 * offsets // storage.QUANT_BLOCK, inside, absmax, nested, storage.NESTED_BLOCK)
    high, low = unpack(tl.load(packed + offsets, mask=inside, other=0), scale, codebook, storage.ROUNDING)
    # a masked byte is 0 and decodes to codebook[0], which is not 0
    return tl.where(tl.interleave(inside, inside), tl.interleave(high, low), 0.0)


@triton.jit(do_not_specialize=["M", "splits"])
def quantized_gemm(
    # operands, output
    x,
    v,
    factor,
    bias,
    y,
    # quantized weight
    packed,
    absmax,
    codebook,
    nested_absmax,
    nested_codebook,
    nested_offset,
    # workspace
    partial,
    counters,
    splits,
    # sizes
    M,
    N,
    K,
    # strides
    stride_x,
    stride_v,
    stride_factor,
    stride_y,
    # flags
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # rank and blocks
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    # blocks and flags of the storage
    QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """y [M, N] = x Wᵀ + v Bᵀ + bias forward, dx [M, K] = dy W + w A backward, over W [N, K] in 4 bits.

    Grid: `splits` programs for each tile. The adapter's steps come first, in the first split.
    """
    pid = tl.program_id(0)
    weight = (packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset)
    storage = Storage(QUANT_BLOCK, NESTED_BLOCK, ROUNDING)
    length, columns = (N, K) if BACKWARD else (K, N)
    tile = pid // splits
    split = pid - tile * splits
    across = tl.cdiv(columns, BLOCK_N)
    rm, rn = tile // across * BLOCK_M + tl.arange(0, BLOCK_M), tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = tl.where(rm < M, rm, 0), tl.where(rn < columns, rn, 0)
    if WIDE:
        m, n = m.to(tl.int64), n.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if split == 0:
        adapter, steps = ((v,), (factor,), (stride_v,), (stride_factor,), (R,)), tl.cdiv(R, BLOCK_K)
        acc = accumulate(acc, adapter, 0, steps, m, n, not BACKWARD, False, PRECISION, BLOCK_K)
    steps_a_split = tl.cdiv(tl.cdiv(length, BLOCK_K), splits)
    for step in range(split * steps_a_split, min(split * steps_a_split + steps_a_split, tl.cdiv(length, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        lhs = tl.load(x + (m * stride_x)[:, None] + k[None, :], mask=(k < length)[None, :], other=0.0)
        # a tile of W has the packed dimension K last: across the output backward, along the reduction forward
        if BACKWARD:
            pairs = tile % across * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            rhs = weight_tile(k, pairs, weight, N, K, storage, WIDE)
            acc = tl.dot(lhs, rhs.to(x.dtype.element_ty), acc, input_precision=PRECISION)
        else:
            pairs = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            rhs = weight_tile(rn, pairs, weight, N, K, storage, WIDE)
            acc = tl.dot(lhs, rhs.to(x.dtype.element_ty).T, acc, input_precision=PRECISION)
    last = True
    if SPLIT:
        offsets = block_offsets(BLOCK_M, BLOCK_N)
        split_sums = partial + tile.to(tl.int64) * splits * BLOCK_M * BLOCK_N
        tl.store(split_sums + split * BLOCK_M * BLOCK_N + offsets, acc)
        last = arrives_last(counters, tile, splits)
        if last:
            acc = ordered_sum(split_sums, offsets, BLOCK_M * BLOCK_N, splits, acc)
    if last:
        if bias is not None:
            acc += tl.load(bias + n)[None, :].to(tl.float32)
        y_offsets = (rm.to(tl.int64) if WIDE else rm)[:, None] * stride_y + rn[None, :]
        tl.store(y + y_offsets, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < columns)[None, :])
