"""A GEMM over a 4-bit weight that dequantizes in its K loop, for few rows: no dense W is written or read.

Decoding is integer work that the tensor cores wait for, so it is short: if the blocks of scales allow it, a row of a
tile has one scale, and the sixteen values of the codebook are looked up in shared memory. On sm_86 a weight takes 7 to
10 instructions in bf16 (`benchmarks.kernels.static_report` compiles the kernels), 9 to 11 if nibbles are extracted from
bytes instead of words, and 23 to 32 with a scale per byte and the codebook in global memory.

Arguments of `quantized_gemm`; strides are of rows, in elements, and the last dimension is contiguous.

                     forward                            backward
  operands           x [M, K]                           x: dy [M, N]
                     v [M, R]                           v: w [M, R]
                     factor: B [N, R]                   factor: A [R, K]
                     bias [N], or None                  bias: None
  output             y [M, N]                           y: dx [M, K]
  quantized weight   weight: W [N, K] with K even, and STORAGE, see dequantize_4bit
  workspace          partial: fp32 tiles of each split, used if SPLIT
                     counters: int32, one per tile, zero between launches
  sizes              M rows, W's N and K
  strides            stride_x, stride_v, stride_factor, stride_y
  flags              BACKWARD; WIDE: offsets need 64 bits; PRECISION: of tl.dot, "tf32" or "ieee"
                     OVERLAPS: the previous launch may still write v and the workspace, see extended_gemm
                     ONE_SCALE: in each row of a tile of W all columns share a scale and none is past K; W is aligned to
                     words of four bytes
  rank               R
  blocks             BLOCK_M x BLOCK_N of y per program, BLOCK_K of the reduction per step
                     SPLIT: `splits` programs share a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize_4bit import block_scales, rounded, storage_of, unpack
from .device_functions import Reduction, accumulate, gdc_wait, sum_of_shares


@triton.jit
def low_nibbles(word):
    """The low nibbles of a word's bytes, from the lowest byte up: [.., 4·words] of [.., words] int32."""
    ends = tl.interleave(word & 15, (word >> 16) & 15)
    return tl.interleave(ends, tl.interleave((word >> 8) & 15, (word >> 24) & 15))


@triton.jit
def weight_tile(
    rows, first, weight, sizes, storage, WIDE: tl.constexpr, ONE_SCALE: tl.constexpr, COLUMNS: tl.constexpr
):
    """W [rows, first + COLUMNS] in fp32, of W [N, K] with K even; columns from K on are 0, rows from N on finite.

    A pair is a packed byte: with K even, none straddles two rows. weight: see dequantize_4bit.
    """
    N, K = sizes
    packed, codebook, nested_absmax = weight[0], weight[2], weight[3]
    row = tl.where(rows < N, rows, 0)
    if WIDE:
        row = row.to(tl.int64)
    if ONE_SCALE:
        blocks = row * (K // storage.QUANT_BLOCK) + first // storage.QUANT_BLOCK
        scale = block_scales(blocks, rows < N, weight, storage.NESTED_BLOCK)[:, None]
        if nested_absmax is not None:
            # A sum over one column only hides the scale's origin from Triton, which lays out a tile that comes from
            # 8-bit loads, such as absmax, for 8-bit products, and then does not read x by ldmatrix (1.3 to 1.6
            # instructions per weight).
            scale = tl.sum(scale, 1)[:, None]
        # by words: a nibble takes one shift and one mask of a register; from bytes it would take twice as many
        words = packed.to(tl.pointer_type(tl.int32)) + (row * (K // 8))[:, None]
        word = tl.load(words + (first // 8 + tl.arange(0, COLUMNS // 8))[None, :])
        # the high nibble of a byte comes first
        nibbles = tl.interleave(low_nibbles(word >> 4), low_nibbles(word))
        values = tl.gather(tl.load(codebook + tl.arange(0, 16)), tl.reshape(nibbles, (nibbles.numel,)), 0)
        tile = rounded(tl.reshape(values, nibbles.shape) * scale, storage.ROUNDING)
    else:
        pairs = first // 2 + tl.arange(0, COLUMNS // 2)
        offsets = (row * (K // 2))[:, None] + pairs[None, :]
        inside = (rows < N)[:, None] & (2 * pairs < K)[None, :]
        scale = block_scales(2 * offsets // storage.QUANT_BLOCK, inside, weight, storage.NESTED_BLOCK)
        high, low = unpack(tl.load(packed + offsets, mask=inside, other=0), scale, codebook, storage.ROUNDING)
        # a masked byte is 0 and decodes to codebook[0], which is not 0
        tile = tl.where(tl.interleave(inside, inside), tl.interleave(high, low), 0.0)
    return tile


@triton.jit(do_not_specialize=["M", "splits"])
def quantized_gemm(
    x, v, factor, bias, y, weight,  # operands, output, quantized weight
    partial, counters, splits,  # workspace
    M, N, K,  # sizes
    stride_x, stride_v, stride_factor, stride_y,  # strides
    # flags
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr, ONE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    # rank and blocks
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STORAGE: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x Wᵀ + v Bᵀ + bias forward, dx [M, K] = dy W + w A backward, over W [N, K] in 4 bits.

    Grid: `splits` programs for each tile. The first split adds the adapter, after its steps of the base.
    """
    pid = tl.program_id(0)
    length, columns = (N, K) if BACKWARD else (K, N)
    tile = pid // splits
    split = pid - tile * splits
    across = tl.cdiv(columns, BLOCK_N)
    rm, rn = tile // across * BLOCK_M + tl.arange(0, BLOCK_M), tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = tl.where(rm < M, rm, 0), tl.where(rn < columns, rn, 0)
    if WIDE:
        m, n = m.to(tl.int64), n.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps_a_split = tl.cdiv(tl.cdiv(length, BLOCK_K), splits)
    for step in range(split * steps_a_split, min(split * steps_a_split + steps_a_split, tl.cdiv(length, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        lhs = tl.load(x + (m * stride_x)[:, None] + k[None, :], mask=(k < length)[None, :], other=0.0)
        # a tile of W has the packed dimension K last: across the output backward, along the reduction forward
        if BACKWARD:
            first = tile % across * BLOCK_N
            rhs = weight_tile(k, first, weight, (N, K), storage_of(STORAGE), WIDE, ONE_SCALE, BLOCK_N)
            acc = tl.dot(lhs, rhs.to(x.dtype.element_ty), acc, input_precision=PRECISION)
        else:
            first = step * BLOCK_K
            rhs = weight_tile(rn, first, weight, (N, K), storage_of(STORAGE), WIDE, ONE_SCALE, BLOCK_K)
            acc = tl.dot(lhs, rhs.to(x.dtype.element_ty).T, acc, input_precision=PRECISION)
    if OVERLAPS:
        gdc_wait()
    if split == 0:
        adapter, steps = ((v,), (factor,), (stride_v,), (stride_factor,), (R,)), tl.cdiv(R, BLOCK_K)
        acc = accumulate(acc, adapter, (0, steps), m, n, Reduction(not BACKWARD, False, PRECISION, BLOCK_K))
    last, acc = sum_of_shares(acc, split, (partial, counters, tile, splits), SPLIT, True)
    if last:
        if bias is not None:
            acc += tl.load(bias + n)[None, :].to(tl.float32)
        y_offsets = (rm.to(tl.int64) if WIDE else rm)[:, None] * stride_y + rn[None, :]
        tl.store(y + y_offsets, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < columns)[None, :])
