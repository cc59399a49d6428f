"""Each instruction on floating-point numbers, conversions too, against a definition of its own, in exact fractions."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from ptx_bench import evaluate
from ptx_numbers import float_bits, nearest, signed, value_of, vectors


def rounded_once(function: Callable[..., Any], *operands: int) -> float:
    """A sum or product of fp32 numbers."""
    values = [value_of(bits) for bits in operands]
    if all(map(math.isfinite, values)):
        return value_of(nearest(function(*map(Fraction, values))))
    with np.errstate(all="ignore"):
        return float(function(*map(np.float64, values)))


def extreme(choose: Callable[[list[float]], float], *operands: int) -> float:
    """The smaller or larger number; a NaN gives way to a number."""
    return choose([value for value in map(value_of, operands) if not math.isnan(value)] or [math.nan])


def to_f16(bits: int) -> int:
    if math.isnan(value_of(bits)):
        return 0x7FFF
    try:
        return int.from_bytes(struct.pack("<e", value_of(bits)), "little")
    except OverflowError:
        return bits >> 16 & 0x8000 | 0x7C00


def to_bf16(bits: int) -> int:
    """The upper half, rounded by the lower one."""
    high, low = bits >> 16, bits & 0xFFFF
    return 0x7FFF if math.isnan(value_of(bits)) else (high + (low > 0x8000 or (low == 0x8000 and high & 1))) & 0xFFFF


def to_tf32(bits: int) -> int:
    """Ties away from zero."""
    if not math.isfinite(value_of(bits)):
        return bits
    return (bits & 0xFFFFE000) + (0x2000 if bits & 0x1000 else 0)


# Instruction -> how many operands it has, the type of its result, and from their bits those of the result, or its value
OPERATIONS: dict[str, tuple[int, Any, Callable[..., float]]] = {
    "add.rn.f32": (2, np.uint32, lambda *bits: rounded_once(lambda a, b: a + b, *bits)),
    "mul.rn.f32": (2, np.uint32, lambda *bits: rounded_once(lambda a, b: a * b, *bits)),
    "fma.rn.f32": (3, np.uint32, lambda *bits: rounded_once(lambda a, b, c: a * b + c, *bits)),
    "min.f32": (2, np.uint32, lambda *bits: extreme(min, *bits)),
    "max.f32": (2, np.uint32, lambda *bits: extreme(max, *bits)),
    "neg.f32": (1, np.uint32, lambda bits: bits ^ 0x80000000),
    "abs.f32": (1, np.uint32, lambda bits: bits & 0x7FFFFFFF),
    "cvt.rn.f16.f32": (1, np.uint16, to_f16),
    "cvt.rn.bf16.f32": (1, np.uint16, to_bf16),
    "cvt.rn.f16x2.f32": (2, np.uint32, lambda high, low: to_f16(high) << 16 | to_f16(low)),
    "cvt.rn.bf16x2.f32": (2, np.uint32, lambda high, low: to_bf16(high) << 16 | to_bf16(low)),
    "cvt.rna.tf32.f32": (1, np.uint32, to_tf32),
}


def agrees(got: int, want: float) -> bool:
    """The same bits, or where these are not defined (of a NaN, and the sign of zero) the same value."""
    if isinstance(want, int):
        return got == want
    return value_of(got) == want or (math.isnan(want) and math.isnan(value_of(got)))


@pytest.mark.parametrize("opcode", OPERATIONS)
@given(given_bits=vectors(float_bits, 3))
@settings(max_examples=60, deadline=None)
def test_floats(opcode: str, given_bits: tuple[list[int], ...]) -> None:
    count, result, definition = OPERATIONS[opcode]
    found = evaluate(opcode, *(np.array(bits, np.uint32) for bits in given_bits[:count]), result=result).tolist()
    for *operands, got in zip(*given_bits[:count], found, strict=True):
        assert agrees(got, definition(*operands)), [hex(bits) for bits in operands]


@given(given_bits=vectors(float_bits, 6))
@settings(max_examples=10, deadline=None)
def test_pairs_are_computed_like_two_numbers(given_bits: tuple[list[int], ...]) -> None:
    columns = [np.array(bits, np.uint32) for bits in given_bits]
    pairs = [np.stack(columns[i : i + 2], 1).copy().view(np.uint64)[:, 0] for i in (0, 2, 4)]
    for opcode, count in (("add.rn", 2), ("mul.rn", 2), ("fma.rn", 3)):
        found = evaluate(f"{opcode}.f32x2", *pairs[:count]).view(np.uint32).reshape(32, 2)
        for half in range(2):
            alone = evaluate(f"{opcode}.f32", *columns[half : 2 * count : 2])
            assert np.array_equal(found[:, half], alone)


def test_a_double_rounding_is_none() -> None:
    """a·b + c where fp64 rounds to the middle between two fp32 numbers, which the exact value is not."""
    a = np.full(32, 0x3F800001, np.uint32)  # 1 + 2^-23
    b = np.full(32, 0x3F800001, np.uint32)
    c = np.full(32, np.float32(2.0**-60).view(np.uint32))
    found = evaluate("fma.rn.f32", a, b, c)
    assert found[0] == nearest(Fraction(value_of(0x3F800001)) ** 2 + Fraction(2) ** -60)
    middle = np.full(32, np.float32(2.0**-24).view(np.uint32))
    one, tiny = np.full(32, 0x3F800000, np.uint32), np.full(32, np.float32(2.0**-24 + 2.0**-47).view(np.uint32))
    assert evaluate("fma.rn.f32", one, tiny, one)[0] == nearest(1 + Fraction(value_of(int(tiny[0]))))
    assert evaluate("fma.rn.f32", one, middle, one)[0] == 0x3F800000  # a tie goes to even


@pytest.mark.parametrize("operation", ["lt", "le", "gt", "ge", "eq", "ne"])
@given(given_bits=vectors(float_bits, 2))
@settings(max_examples=10, deadline=None)
def test_comparisons_with_nan(operation: str, given_bits: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(bits, np.uint32) for bits in given_bits)
    for suffix, on_nan in (("", False), ("u", True)):
        found = evaluate(f"setp.{operation}{suffix}.f32 %p1, %x0, %x1;\nselp.b32", a, b, extra="%p1")
        for x, y, bits_a, bits_b, got in zip(
            *(map(value_of, column) for column in given_bits), *given_bits, found.tolist(), strict=True
        ):
            want = on_nan if math.isnan(x) or math.isnan(y) else getattr(operator, operation)(x, y)
            assert got == (bits_a if want else bits_b)


CONVERSIONS: dict[str, tuple[Any, Any, Callable[[Any], Any]]] = {
    "cvt.u32.u16": (np.uint16, np.uint32, int),
    "cvt.s64.s32": (np.uint32, np.int64, lambda x: signed(x, 32)),
    "cvt.u64.u32": (np.uint32, np.uint64, int),
    "cvt.u32.u64": (np.uint64, np.uint32, lambda x: x % 2**32),
    "cvt.u16.u32": (np.uint32, np.uint16, lambda x: x % 2**16),
    "cvt.rn.f32.s32": (np.uint32, np.float32, lambda x: value_of(nearest(Fraction(signed(x, 32))))),
    "cvt.rn.f32.u32": (np.uint32, np.float32, lambda x: value_of(nearest(Fraction(x)))),
    "cvt.f32.f16": (np.uint16, np.float32, lambda x: struct.unpack("<e", x.to_bytes(2, "little"))[0]),
    "cvt.f32.bf16": (np.uint16, np.float32, lambda x: value_of(x << 16)),
    "cvt.rzi.s32.f32": (np.float32, np.int32, lambda x: max(-(2**31), min(2**31 - 1, math.trunc(x)))),
}


@pytest.mark.parametrize("opcode", CONVERSIONS)
def test_other_conversions(opcode: str) -> None:
    of, to, want = CONVERSIONS[opcode]
    g = np.random.default_rng(0)
    if of is np.float32:
        a = (g.standard_normal(32) * 1e10).astype(of)
    else:
        a = g.integers(0, 2 ** (np.dtype(of).itemsize * 8), 32, dtype=np.uint64).astype(of)
    np.testing.assert_array_equal(evaluate(opcode, a, result=to), np.array(list(map(want, a.tolist())), to))
