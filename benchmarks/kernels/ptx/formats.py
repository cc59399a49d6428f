"""PTX types as numpy dtypes, and the conversions that numpy lacks: bf16, tf32, exact fused multiply-add."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SIGNED = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
UNSIGNED = {f"{kind}{bits}": getattr(np, f"uint{bits}") for kind in "ub" for bits in (8, 16, 32, 64)}
FLOATS = {"f32": np.float32, "f64": np.float64}
TYPES: dict[str, Any] = {**SIGNED, **UNSIGNED, **FLOATS, "pred": bool}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # unsigned type by bytes
WIDER = {np.int16: np.int32, np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}
TF32 = np.uint32(0xFFFFE000)  # sign, exponent and 10 bits of the fraction


def pieces(addresses: Array, size: int, step: int) -> Array:
    """Indices [n, k] of the `step`-byte pieces that hold `size` bytes at each address."""
    return (addresses // step)[:, None] + np.arange(max(1, size // step))


@cache
def immediate(text: str, dtype: Any) -> Any:
    """A literal operand: decimal, hexadecimal, with or without a U, or the bits of a float (0f3F800000)."""
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    size = np.dtype(dtype).itemsize
    return BITS[size](int(text.removesuffix("U"), 0) % (1 << 8 * size)).view(dtype)


def from_bf16(bits: Array) -> Array:
    """fp32 values of bf16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Array) -> Array:
    """bf16 bits of fp32 values, ties to even; a NaN becomes the canonical one, as `cvt.rn.bf16` says."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def from_f16(bits: Array) -> Array:
    """fp32 values of fp16 bits."""
    return np.ascontiguousarray(bits).astype(np.uint16).view(np.float16).astype(np.float32)


def to_f16(values: Array) -> Array:
    """fp16 bits of fp32 values, ties to even; a NaN becomes the canonical one."""
    bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def truncate_tf32(bits: Array) -> Array:
    """The fp32 values that a tf32 tensor core reads from 32 bits: it ignores the lower 13 of the fraction."""
    return (np.ascontiguousarray(bits).view(np.uint32) & TF32).view(np.float32)


def round_tf32(bits: Array) -> Array:
    """`cvt.rna.tf32.f32`: to the nearest, ties away from zero; NaN and infinities unchanged."""
    bits = np.ascontiguousarray(bits).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (bits + np.uint32(0x1000)) & TF32, bits)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in fp32, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    inexact = np.isfinite(total) & (error != 0)
    if inexact.any():
        bits = total.view(np.int64)
        even = (bits & 1) == 0
        up = (error > 0) == (total > 0)  # the exact value is farther from zero than the sum
        bits = np.where(inexact & even, bits + np.where(up, 1, -1), bits)
        total = bits.view(np.float64)
    return total.astype(np.float32)
