"""Each instruction on floating-point numbers, conversions too, against a definition of its own, in exact fractions."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_bench import evaluate
from ptx_numbers import float_bits, nearest, signed, value_of, vectors

EXACT = {
    "add.rn.f32": lambda a, b, c: a + b,
    "mul.rn.f32": lambda a, b, c: a * b,
    "fma.rn.f32": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("opcode", EXACT)
@given(given_bits=vectors(float_bits, 3))
@settings(max_examples=60, deadline=None)
def test_floats_are_rounded_once(opcode: str, given_bits: tuple[list[int], ...]) -> None:
    count = 3 if opcode.startswith("fma") else 2
    found = evaluate(opcode, *(np.array(bits, np.uint32) for bits in given_bits[:count])).tolist()
    for *operands, got in zip(*given_bits, found, strict=True):
        values = [value_of(bits) for bits in operands[:count]] + [0.0] * (3 - count)
        if not all(map(math.isfinite, values)):
            with np.errstate(all="ignore"):
                a, b, c = (np.float64(value) for value in values)
                want = {"a": a + b, "m": a * b, "f": a * b + c}[opcode[0]]
            assert (math.isnan(want) and math.isnan(value_of(got))) or value_of(got) == want
            continue
        exact = nearest(EXACT[opcode](*map(Fraction, values)))
        assert got == exact or (exact == 0 and got in (0, 0x80000000)), [hex(bits) for bits in operands]


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


COMPARED = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


@pytest.mark.parametrize("operation", COMPARED)
@given(given_bits=vectors(float_bits, 2))
@settings(max_examples=10, deadline=None)
def test_comparisons_with_nan(operation: str, given_bits: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(bits, np.uint32) for bits in given_bits)
    for suffix, on_nan in (("", False), ("u", True)):
        found = evaluate(f"setp.{operation}{suffix}.f32 %p1, %x0, %x1;\nselp.b32", a, b, extra="%p1")
        for x, y, bits_a, bits_b, got in zip(
            *(map(value_of, column) for column in given_bits), *given_bits, found.tolist(), strict=True
        ):
            want = on_nan if math.isnan(x) or math.isnan(y) else COMPARED[operation](x, y)
            assert got == (bits_a if want else bits_b)


@given(given_bits=st.lists(float_bits, min_size=32, max_size=32))
@settings(max_examples=80, deadline=None)
def test_conversions_to_16_bits_round_to_even(given_bits: list[int]) -> None:
    bits = np.array(given_bits, np.uint32)
    halves = evaluate("cvt.rn.f16.f32", bits, result=np.uint16)
    brains = evaluate("cvt.rn.bf16.f32", bits, result=np.uint16)
    pair = evaluate("cvt.rn.bf16x2.f32", bits, bits[::-1].copy(), result=np.uint32)
    assert pair.tolist() == [int(h) << 16 | int(low) for h, low in zip(brains, brains[::-1], strict=True)]
    for x, half, brain in zip(given_bits, halves.tolist(), brains.tolist(), strict=True):
        value = value_of(x)
        if math.isnan(value):
            assert (half, brain) == (0x7FFF, 0x7FFF)
            continue
        low, high = x >> 16, x & 0xFFFF  # bf16: the upper half, rounded by the lower one
        assert brain == (low + (high > 0x8000 or (high == 0x8000 and low & 1))) & 0xFFFF
        got = struct.unpack("<e", half.to_bytes(2, "little"))[0]
        if abs(value) < 65504:
            step = 2.0 ** (max(-14, math.frexp(value)[1] - 1) - 10)
            assert abs(got - value) <= step / 2
            if abs(got - value) == step / 2 and step > 2**-24:
                assert half % 2 == 0
        elif abs(value) >= 65520:
            assert math.isinf(got)


@given(given_bits=st.lists(float_bits, min_size=32, max_size=32))
@settings(max_examples=30, deadline=None)
def test_tf32_is_rounded_away_from_zero_at_ties(given_bits: list[int]) -> None:
    found = evaluate("cvt.rna.tf32.f32", np.array(given_bits, np.uint32))
    for x, got in zip(given_bits, found.tolist(), strict=True):
        if not math.isfinite(value_of(x)):
            assert got == x
            continue
        lower = x & 0xFFFFE000
        assert got == lower + (0x2000 if x & 0x1000 else 0)


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


@given(given_bits=vectors(float_bits, 2))
@settings(max_examples=15, deadline=None)
def test_the_smaller_of_a_number_and_nan_is_the_number(given_bits: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(bits, np.uint32) for bits in given_bits)
    for opcode, choose in (("min.f32", min), ("max.f32", max)):
        for x, y, got in zip(
            *(map(value_of, column) for column in given_bits),
            map(value_of, evaluate(opcode, a, b).tolist()),
            strict=True,
        ):
            numbers = [value for value in (x, y) if not math.isnan(value)]
            assert (got == choose(numbers)) if numbers else math.isnan(got)


@given(given_bits=vectors(float_bits, 1))
@settings(max_examples=10, deadline=None)
def test_neg_and_abs_change_the_sign_alone(given_bits: tuple[list[int]]) -> None:
    (bits,) = given_bits
    a = np.array(bits, np.uint32)
    assert evaluate("neg.f32", a).tolist() == [x ^ 0x80000000 for x in bits]
    assert evaluate("abs.f32", a).tolist() == [x & 0x7FFFFFFF for x in bits]
    assert evaluate("neg.s32", a).tolist() == [-x % 2**32 for x in bits]
