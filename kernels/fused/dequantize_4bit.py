"""Dequantization of 4-bit weights, exact to the bit, on its own or in the same launch as the thin products.

Byte i of a weight [N, K] in 4 bits packs two elements: 2i in the high nibble, 2i + 1 in the low one, row by row over
the whole weight. W = dtype(codebook[nibble]·scale(element // QUANT_BLOCK)), computed in fp32. Nested, scale =
nested_codebook[absmax]·nested_absmax + nested_offset: a product and a sum, each rounded, so these kernels are compiled
without contraction to FMA (`exact` in the launcher). The codebook of sixteen fp32 entries is one cache line, so a
warp's gather is one access.

Arguments of kernels that take such a weight:

  weight       a tuple: packed [ceil(ELEMENTS / 2)] uint8
               absmax [blocks] fp32, or uint8 if nested
               codebook [16] fp32
               nested_absmax [ceil(blocks / NESTED_BLOCK)] fp32, nested_codebook [256] fp32, nested_offset [1] fp32:
               None, all three, if not nested
  out          W [N, K], contiguous; ELEMENTS: N·K
  STORAGE      a tuple: QUANT_BLOCK: elements that share a scale
               NESTED_BLOCK: scales that share a nested one
               ROUNDING: the dtype that W had before quantization and is rounded to: 0 fp32, 1 bf16, 2 fp16
  BLOCK_BYTES  packed bytes per program
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

Storage = namedtuple("Storage", "QUANT_BLOCK NESTED_BLOCK ROUNDING")


@triton.jit
def storage_of(STORAGE: tl.constexpr):
    """A kernel's STORAGE by name: Triton takes named tuples as constants only since 3.8."""
    return Storage(STORAGE[0], STORAGE[1], STORAGE[2])


@triton.jit
def block_scales(block, inside, weight, NESTED_BLOCK: tl.constexpr):
    """The fp32 scale of each block of a weight."""
    _, absmax, _, nested_absmax, nested_codebook, nested_offset = weight
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
    """Decode one program's BLOCK_BYTES bytes into `out`. Offsets are 64 bits: a weight may exceed 2³¹ elements."""
    packed, codebook = weight[0], weight[2]
    i = pid.to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    inside = 2 * i < ELEMENTS
    scale = block_scales(2 * i // storage.QUANT_BLOCK, inside, weight, storage.NESTED_BLOCK)
    high, low = unpack(tl.load(packed + i, mask=inside, other=0), scale, codebook, storage.ROUNDING)
    offsets = pid.to(tl.int64) * 2 * BLOCK_BYTES + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out + offsets, tl.interleave(high, low).to(out.dtype.element_ty), mask=offsets < ELEMENTS)


@triton.jit
def dequantize(weight, out, ELEMENTS, STORAGE: tl.constexpr, BLOCK_BYTES: tl.constexpr):
    """out [ELEMENTS] = W. Grid: one program for BLOCK_BYTES bytes."""
    dequantize_bytes(tl.program_id(0), weight, out, ELEMENTS, storage_of(STORAGE), BLOCK_BYTES)
