"""What each arithmetic instruction computes: functions of numpy vectors, by opcode.

A function gets the instruction's parts (`("mad", "wide", "s32")`), the dtype of its last part, and its source operands
in that dtype; it returns the result. Integers wrap; fp32 rounds to the nearest and keeps subnormals, as `.rn` without
`.ftz` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import formats
from .formats import FLOATS, WIDER, Array

Parts = tuple[str, ...]
Function = Callable[..., Array]
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {"eq": np.equal, "ne": np.not_equal}
COMPARISONS |= {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARISONS |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # of unsigned integers


def is_float(dtype: Any) -> bool:
    """True for f32 and f64."""
    return dtype in FLOATS.values()


def multiply(parts: Parts, dtype: Any, a: Array, b: Array) -> Array:
    """mul: `.lo` keeps the lower half, `.hi` the upper one, `.wide` both."""
    if is_float(dtype) or parts[1] == "lo":
        return a * b
    wider = WIDER.get(dtype, object)
    product = a.astype(wider) * b.astype(wider)
    return product if parts[1] == "wide" else (product >> np.dtype(dtype).itemsize * 8).astype(dtype)


def divide(parts: Parts, dtype: Any, a: Array, b: Array) -> Array:
    """div: integers round toward zero; an integer division by zero is undefined, here all ones."""
    if is_float(dtype):
        return a / b
    wide = _widest(dtype)
    numerator, denominator = a.astype(wide), np.where(b == 0, dtype(1), b).astype(wide)
    quotient = (numerator - np.fmod(numerator, denominator)) // denominator
    return np.where(b == 0, ~dtype(0), quotient.astype(dtype))


def _widest(dtype: Any) -> Any:
    """The 64-bit integer type of the same signedness."""
    return np.int64 if np.issubdtype(dtype, np.signedinteger) else np.uint64


def shift(parts: Parts, dtype: Any, a: Array, count: Array) -> Array:
    """shl and shr: `.s` fills with the sign, `.u` and `.b` with zeros; counts beyond the width move everything out."""
    way = np.left_shift if parts[0] == "shl" else np.right_shift
    return way(a, np.minimum(count, 64).astype(dtype))  # numpy moves everything out, too


def extract_field(parts: Parts, dtype: Any, a: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start` on; `.s` extends its highest bit, or bit 31 if the field ends beyond."""
    wide, start, length = _widest(dtype), np.minimum(start & 0xFF, 63), np.minimum(length & 0xFF, 32)
    spare = (64 - np.maximum(length, 1)).astype(wide)  # bits above the field, filled by shifting left and back
    field = a.astype(wide) >> start.astype(wide) << spare >> spare
    return np.where(length > 0, field, 0).astype(dtype)


def permute_bytes(parts: Parts, dtype: Any, a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32: each nibble of the selector picks a byte of b:a; its fourth bit repeats that byte's sign."""
    pool = np.stack([a, b], 1).astype(np.uint32).view(np.uint8).reshape(len(a), 8)
    result = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = pool[np.arange(len(a)), (nibble & 7).astype(np.int64)]
        result[:, i] = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    return result.view(np.uint32)[:, 0]


def compare(operation: str, dtype: Any, a: Array, b: Array) -> Array:
    """setp's comparison: with a NaN, ordered ones are false, and those that end in `u` are true."""
    if not is_float(dtype):
        return COMPARISONS[operation](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if operation in ("nan", "num"):
        return nan if operation == "nan" else ~nan
    result = COMPARISONS[operation.removesuffix("u")](a, b)
    return result | nan if operation.endswith("u") else result & ~nan


def set_predicate(parts: Parts, dtype: Any, a: Array, b: Array, *others: Array) -> Array:
    """setp: a comparison, which `.and` or `.or` combines with another predicate."""
    result = compare(parts[1], dtype, a, b)
    for other in others:
        result = FUNCTIONS[parts[2]](parts, bool, result, other)
    return result


# Conversions that numpy lacks, by their types: the dtype of the source's bits, and the function
CONVERSIONS: dict[str, tuple[Any, Callable[[Array], Array]]] = {
    "f32.bf16": (np.uint16, formats.from_bf16),
    "rn.f32.bf16": (np.uint16, formats.from_bf16),
    "f32.f16": (np.uint16, formats.from_f16),
    "rn.bf16.f32": (np.float32, formats.to_bf16),
    "rn.f16.f32": (np.float32, formats.to_f16),
    "rna.tf32.f32": (np.uint32, formats.round_tf32),
}
TO_WHOLE = {"rzi": np.trunc, "rni": np.rint}


def convert(parts: Parts, source: Callable[[Any], Array]) -> Array | None:
    """cvt: `source(dtype)` gives the operand; None if this conversion is not supported."""
    name = ".".join(parts[1:])
    if name in CONVERSIONS:
        dtype, function = CONVERSIONS[name]
        return function(source(dtype))
    to, of = (formats.TYPES.get(kind) for kind in parts[-2:])
    rounding = parts[1] if len(parts) == 4 else ""
    if to is None or of is None:
        return None
    is_plain = rounding == "rn" if is_float(to) else not is_float(of)
    if is_plain:
        return source(of).astype(to)
    if not is_float(to) and rounding in TO_WHOLE:
        return _saturated(TO_WHOLE[rounding](source(of)), to)
    return None


def _saturated(values: Array, dtype: Any) -> Array:
    """Whole numbers as integers: clamped to the range, NaN as zero."""
    info = np.iinfo(dtype)
    clamped = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), float(info.min), float(info.max))
    whole = np.where(clamped >= float(info.max), info.max, clamped.astype(np.int64))
    return whole.astype(dtype)


def _plain(function: Any) -> Function:
    return lambda parts, dtype, *operands: function(*operands)


FUNCTIONS: dict[str, Function] = {
    "add": _plain(np.add),
    "sub": _plain(np.subtract),
    "mul": multiply,
    "mad": lambda parts, dtype, a, b, c: multiply(parts, dtype, a, b) + c,  # c is as wide as the product
    "fma": _plain(formats.fused_multiply_add),
    "div": divide,
    "rem": lambda parts, dtype, a, b: a - divide(parts, dtype, a, b) * b,  # with the dividend's sign
    "min": _plain(np.fmin),  # of a float NaN and a number, the number
    "max": _plain(np.fmax),
    "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or),
    "xor": _plain(np.bitwise_xor),
    "not": _plain(np.invert),
    "neg": _plain(np.negative),
    "abs": _plain(np.abs),
    "shl": shift,
    "shr": shift,
    "bfe": extract_field,
    "prmt": permute_bytes,
    "setp": set_predicate,
    "selp": _plain(lambda a, b, condition: np.where(condition, a, b)),
}
# Operands whose type is not the instruction's, by position
OPERANDS: dict[str, dict[int, Any]] = {"selp": {2: bool}, "setp": {2: bool}, "bfe": {1: np.uint32, 2: np.uint32}}
OPERANDS |= {"shl": {1: np.uint32}, "shr": {1: np.uint32}}
WIDE_ADDEND = ("mad", "wide")
