"""Quantized weights: exact dequantization beside the thin products, and a GEMM that dequantizes as it goes.

Byte i of a weight [N, K] in 4 bits has elements 2i (high nibble) and 2i + 1; W = dtype(table[nibble]·scale(element
// BLOCK)) in fp32. Nested, scale = table2[absmax8]·absmax2 + offset, multiplied and then added: these kernels are
compiled without contraction to FMA. The table of sixteen lies in one line of the first-level cache, where a warp's
look-up is one access.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import arrive, ordered_sum, places
from .extended_gemm import accumulate
from .low_rank import backward_rows, forward_rows


@triton.jit
def scales_of(block, inside, absmax, absmax2, table2, offset, BLOCK2: tl.constexpr):
    """The fp32 scale of each block."""
    if absmax2 is None:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        entry = tl.load(table2 + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = entry * tl.load(absmax2 + block // BLOCK2, mask=inside, other=0.0) + tl.load(offset)
    return scale


@triton.jit
def pair_of(octet, scale, table, ROUNDING: tl.constexpr):
    """Both elements of each byte, in fp32, rounded to the dtype that the weight had (0 none, 1 bf16, 2 fp16)."""
    high = tl.load(table + (octet >> 4).to(tl.int32)) * scale
    low = tl.load(table + (octet & 15).to(tl.int32)) * scale
    if ROUNDING == 1:
        high, low = high.to(tl.bfloat16).to(tl.float32), low.to(tl.bfloat16).to(tl.float32)
    if ROUNDING == 2:
        high, low = high.to(tl.float16).to(tl.float32), low.to(tl.float16).to(tl.float32)
    return high, low


@triton.jit
def dequantize_bytes(pid, octets, absmax, table, absmax2, table2, offset, out, ELEMENTS,
                     BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROUNDING: tl.constexpr,
                     BYTES: tl.constexpr):  # fmt: skip
    """One program's BYTES bytes into `out`."""
    i = pid.to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = 2 * i < ELEMENTS
    scale = scales_of(2 * i // BLOCK, inside, absmax, absmax2, table2, offset, BLOCK2)
    high, low = pair_of(tl.load(octets + i, mask=inside, other=0), scale, table, ROUNDING)
    place = pid.to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(out + place, tl.interleave(high, low).to(out.dtype.element_ty), mask=place < ELEMENTS)


@triton.jit
def dequantize(
    octets, absmax, table, absmax2, table2, offset, out,
    ELEMENTS,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROUNDING: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out [ELEMENTS] = W: octets uint8, absmax fp32, or uint8 with absmax2 fp32, table2 [256], offset [1]."""
    dequantize_bytes(tl.program_id(0), octets, absmax, table, absmax2, table2, offset, out, ELEMENTS,
                     BLOCK, BLOCK2, ROUNDING, BYTES)  # fmt: skip


@triton.jit(do_not_specialize=["M", "seed", "threshold", "prep_programs"])
def prep_forward_quantized(
    x, factors, cores, us, v,
    partial, counters,
    octets, absmax, table, absmax2, table2, offset, scratch,
    M, K, ELEMENTS, prep_programs,
    sx, sf, sv,
    scales, seed, threshold,
    DROPOUT: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROUNDING: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """`prep_forward`, and beside it W into `scratch`: the first programs have rows of x, the others bytes of W."""
    pid = tl.program_id(0)
    if pid < prep_programs:
        forward_rows(pid, x, factors, cores, us, v, partial, counters, M, K, sx, sf, sv, scales, seed, threshold,
                     DROPOUT, EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION, R, PARTS, RP, BM, BK, BJ,
                     SPLITS)  # fmt: skip
    else:
        dequantize_bytes(pid - prep_programs, octets, absmax, table, absmax2, table2, offset, scratch, ELEMENTS,
                         BLOCK, BLOCK2, ROUNDING, BYTES)  # fmt: skip


@triton.jit(do_not_specialize=["M", "prep_programs"])
def prep_backward_quantized(
    dys, factors, cores, t, w,
    partial, counters,
    octets, absmax, table, absmax2, table2, offset, scratch,
    M, Ks, ELEMENTS, prep_programs,
    sdy, sf, sw,
    scales,
    NEED_DX: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROUNDING: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """`prep_backward`, and beside it W into `scratch`."""
    pid = tl.program_id(0)
    if pid < prep_programs:
        backward_rows(pid, dys, factors, cores, t, w, partial, counters, M, Ks, sdy, sf, sw, scales,
                      NEED_DX, EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION, R, PARTS, RP, BM, BK, BJ,
                      SPLITS)  # fmt: skip
    else:
        dequantize_bytes(pid - prep_programs, octets, absmax, table, absmax2, table2, offset, scratch, ELEMENTS,
                         BLOCK, BLOCK2, ROUNDING, BYTES)  # fmt: skip


@triton.jit
def weight_tile(rows, pairs, octets, absmax, table, absmax2, table2, offset, N, K,
                WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROUNDING: tl.constexpr):  # fmt: skip
    """W [rows, 2·pairs] in fp32, of W [N, K] with K even; what lies outside is 0."""
    inside = (rows < N)[:, None] & (2 * pairs < K)[None, :]
    place = (rows.to(tl.int64) if WIDE else rows)[:, None] * (K // 2) + pairs[None, :]
    scale = scales_of(2 * place // BLOCK, inside, absmax, absmax2, table2, offset, BLOCK2)
    high, low = pair_of(tl.load(octets + place, mask=inside, other=0), scale, table, ROUNDING)
    return tl.where(tl.interleave(inside, inside), tl.interleave(high, low), 0.0)


@triton.jit(do_not_specialize=["M"])
def quantized_gemm(
    x, v, factor, bias, y,
    octets, absmax, table, absmax2, table2, offset,
    partial, counters,
    M, N, K,
    sx, sv, sf, sy,
    BACKWARD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x W[N, K]ᵀ + v Bᵀ + bias forward, dx [M, K] = dy W + w A backward, over W in 4 bits.

    x: x [M, K], or dy [M, N]; v: v or w [M, R]; factor: B [N, R], or A [R, K]; y: y, or dx. BM rows, BN columns of y a
    program and BK of the reduction a step. The adapter's steps come first, in the first of SPLITS ranges.
    """
    pid = tl.program_id(0)
    length, columns = (N, K) if BACKWARD else (K, N)
    tile, split, across = pid // SPLITS, pid % SPLITS, tl.cdiv(columns, BN)
    rm, rn = tile // across * BM + tl.arange(0, BM), tile % across * BN + tl.arange(0, BN)
    m, n = tl.where(rm < M, rm, 0), tl.where(rn < columns, rn, 0)
    if WIDE:
        m, n = m.to(tl.int64), n.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    if split == 0:
        acc = accumulate(acc, (v,), (factor,), (sv,), (sf,), (R,), 0, tl.cdiv(R, BK), m, n, not BACKWARD, False,
                         PRECISION, BK)  # fmt: skip
    share = tl.cdiv(tl.cdiv(length, BK), SPLITS)
    for step in range(split * share, min(split * share + share, tl.cdiv(length, BK))):
        k = step * BK + tl.arange(0, BK)
        lhs = tl.load(x + (m * sx)[:, None] + k[None, :], mask=(k < length)[None, :], other=0.0)
        if BACKWARD:
            pairs = tile % across * (BN // 2) + tl.arange(0, BN // 2)
            rhs = weight_tile(
                k, pairs, octets, absmax, table, absmax2, table2, offset, N, K, WIDE, BLOCK, BLOCK2, ROUNDING
            )
            acc = tl.dot(lhs, rhs.to(x.dtype.element_ty), acc, input_precision=PRECISION)
        else:
            pairs = step * (BK // 2) + tl.arange(0, BK // 2)
            rhs = weight_tile(
                rn, pairs, octets, absmax, table, absmax2, table2, offset, N, K, WIDE, BLOCK, BLOCK2, ROUNDING
            )
            acc = tl.dot(lhs, rhs.to(x.dtype.element_ty).T, acc, input_precision=PRECISION)
    last = True
    if SPLITS > 1:
        offsets = places(BM, BN)
        own = partial + tile.to(tl.int64) * SPLITS * BM * BN
        tl.store(own + split * BM * BN + offsets, acc)
        last = arrive(counters, tile, SPLITS)
        if last:
            acc = ordered_sum(own, offsets, BM * BN, SPLITS, acc)
    if last:
        if bias is not None:
            acc += tl.load(bias + n)[None, :].to(tl.float32)
        place = (rm.to(tl.int64) if WIDE else rm)[:, None] * sy + rn[None, :]
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=(rm < M)[:, None] & (rn < columns)[None, :])
