"""Dequantization of 4-bit weights, exact to the bit, on its own or in the same launch as the thin products.

Byte i of a weight [N, K] in 4 bits packs two elements: 2i in the high nibble, 2i + 1 in the low one, row by row over
the whole weight. W = dtype(codebook[nibble]·scale(element // QUANT_BLOCK)), computed in fp32. Nested, scale =
nested_codebook[absmax]·nested_absmax + nested_offset: a product and a sum, each with its own rounding, so that these
kernels are compiled without contraction to FMA (`exact` in the launcher). The codebook of sixteen fp32 entries is one
cache line, in which a warp's gather is one access.

Arguments, in addition to those of `prep_forward` and `prep_backward` (see low_rank):

  quantized weight   packed [ceil(ELEMENTS / 2)] uint8
                     absmax [blocks] fp32, or uint8 if nested
                     codebook [16] fp32
                     nested_absmax [ceil(blocks / NESTED_BLOCK)] fp32, nested_codebook [256] fp32, nested_offset [1]
                     fp32: None, all three, if not nested
  output             out, or scratch: W [N, K], contiguous
  sizes              ELEMENTS: N·K; prep_programs: programs of the thin products, the first of the grid
  blocks             QUANT_BLOCK: elements that share a scale; NESTED_BLOCK: scales that share a nested one
                     BLOCK_BYTES: packed bytes a program
  flags              ROUNDING: the dtype that W had before quantization and is rounded to: 0 fp32 (no rounding), 1 bf16,
                     2 fp16
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .low_rank import backward_rows, forward_rows
from .projection import PrepBlocks, PrepFlags, Ranks


class Storage(NamedTuple):
    """Storage format of a weight: elements a scale, scales a nested scale, and the dtype that W had."""

    QUANT_BLOCK: tl.constexpr
    NESTED_BLOCK: tl.constexpr
    ROUNDING: tl.constexpr


@triton.jit
def block_scales(block, inside, absmax, nested, NESTED_BLOCK: tl.constexpr):
    """The fp32 scale of each block; nested: (nested_absmax, nested_codebook, nested_offset), or three None."""
    nested_absmax, nested_codebook, nested_offset = nested
    if nested_absmax is None:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        entry = tl.load(nested_codebook + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        scale = entry * tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0) + tl.load(nested_offset)
    return scale


@triton.jit
def rounded(values, ROUNDING: tl.constexpr):
    """Values in fp32, rounded to the dtype that the weight had."""
    if ROUNDING == 1:
        values = values.to(tl.bfloat16).to(tl.float32)
    if ROUNDING == 2:
        values = values.to(tl.float16).to(tl.float32)
    return values


@triton.jit
def unpack(byte, scale, codebook, ROUNDING: tl.constexpr):
    """Both elements of each byte in fp32, high nibble first; they share a scale, as QUANT_BLOCK is even."""
    high = tl.load(codebook + (byte >> 4).to(tl.int32)) * scale
    low = tl.load(codebook + (byte & 15).to(tl.int32)) * scale
    return rounded(high, ROUNDING), rounded(low, ROUNDING)


@triton.jit
def dequantize_bytes(pid, weight, out, ELEMENTS, storage, BLOCK_BYTES: tl.constexpr):
    """One program's BLOCK_BYTES bytes into `out`.

    weight: (packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset). Offsets are
    64 bits: a weight may have more than 2³¹ elements.
    """
    packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset = weight
    nested = (nested_absmax, nested_codebook, nested_offset)
    i = pid.to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    inside = 2 * i < ELEMENTS
    scale = block_scales(2 * i // storage.QUANT_BLOCK, inside, absmax, nested, storage.NESTED_BLOCK)
    high, low = unpack(tl.load(packed + i, mask=inside, other=0), scale, codebook, storage.ROUNDING)
    offsets = pid.to(tl.int64) * 2 * BLOCK_BYTES + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out + offsets, tl.interleave(high, low).to(out.dtype.element_ty), mask=offsets < ELEMENTS)


@triton.jit
def dequantize(
    # quantized weight, output
    packed,
    absmax,
    codebook,
    nested_absmax,
    nested_codebook,
    nested_offset,
    out,
    # sizes
    ELEMENTS,
    # blocks and flags of the storage
    QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """out [ELEMENTS] = W. Grid: one program for BLOCK_BYTES bytes."""
    weight = (packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset)
    storage = Storage(QUANT_BLOCK, NESTED_BLOCK, ROUNDING)
    dequantize_bytes(tl.program_id(0), weight, out, ELEMENTS, storage, BLOCK_BYTES)


@triton.jit(do_not_specialize=["M", "splits", "seeds", "threshold", "prep_programs"])
def prep_forward_quantized(
    # inputs
    x,
    factors,
    cores,
    # outputs
    us,
    v,
    # workspace
    partial,
    counters,
    splits,
    # quantized weight and its dequantized values
    packed,
    absmax,
    codebook,
    nested_absmax,
    nested_codebook,
    nested_offset,
    scratch,
    # sizes
    M,
    K,
    ELEMENTS,
    prep_programs,
    # strides
    stride_x,
    stride_factor,
    stride_v,
    # scalars
    scales,
    seeds,
    threshold,
    # flags
    DROPOUT: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    # ranks
    R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    R_PADDED: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPLIT: tl.constexpr,
    # blocks and flags of the storage
    QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """`prep_forward`, and W into `scratch` by the programs of the grid that follow.

    One launch serves both because neither reads what the other writes; the GEMM that follows reads both.
    """
    pid = tl.program_id(0)
    if pid < prep_programs:
        forward_rows(
            pid,
            (x, factors, cores, us, v),
            (partial, counters, splits),
            (M, K),
            (stride_x, stride_factor, stride_v),
            scales,
            (seeds, threshold),
            PrepFlags(EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION),
            Ranks(R, R_BLOCKS, R_PADDED),
            PrepBlocks(BLOCK_M, BLOCK_K, BLOCK_J, SPLIT),
            DROPOUT,
        )
    else:
        weight = (packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset)
        storage = Storage(QUANT_BLOCK, NESTED_BLOCK, ROUNDING)
        dequantize_bytes(pid - prep_programs, weight, scratch, ELEMENTS, storage, BLOCK_BYTES)


@triton.jit(do_not_specialize=["M", "splits", "prep_programs"])
def prep_backward_quantized(
    # inputs
    dys,
    factors,
    cores,
    # outputs
    t,
    w,
    # workspace
    partial,
    counters,
    splits,
    # quantized weight and its dequantized values
    packed,
    absmax,
    codebook,
    nested_absmax,
    nested_codebook,
    nested_offset,
    scratch,
    # sizes
    M,
    Ks,
    ELEMENTS,
    prep_programs,
    # strides
    stride_dy,
    stride_factor,
    stride_w,
    # scalars
    scales,
    # flags
    NEED_DX: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    # ranks
    R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    R_PADDED: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPLIT: tl.constexpr,
    # blocks and flags of the storage
    QUANT_BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """`prep_backward`, and W into `scratch` by the programs of the grid that follow."""
    pid = tl.program_id(0)
    if pid < prep_programs:
        backward_rows(
            pid,
            (dys, factors, cores, t, w),
            (partial, counters, splits),
            (M, Ks),
            (stride_dy, stride_factor, stride_w),
            scales,
            PrepFlags(EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION),
            Ranks(R, R_BLOCKS, R_PADDED),
            PrepBlocks(BLOCK_M, BLOCK_K, BLOCK_J, SPLIT),
            NEED_DX,
        )
    else:
        weight = (packed, absmax, codebook, nested_absmax, nested_codebook, nested_offset)
        storage = Storage(QUANT_BLOCK, NESTED_BLOCK, ROUNDING)
        dequantize_bytes(pid - prep_programs, weight, scratch, ELEMENTS, storage, BLOCK_BYTES)
