"""Bits of numbers as instructions read them, and what is nearest to an exact value, for tests of the PTX executor."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

WIDTH = {"s16": 16, "u16": 16, "b16": 16, "s32": 32, "u32": 32, "b32": 32, "s64": 64, "u64": 64, "b64": 64}
WIDTH |= {"count": 32, "place": 32, "length": 32}  # of bits: ranges of a u32
EDGES_32 = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE)
FLOAT_EDGES = (
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
    0x7FC00000, 0x7F800001, 0x33800000, 0x3F7FFFFF, 0x4B800000, 0x34000000, 0x477FE000, 0x477FF000, 0x38800000,
)  # fmt: skip
bits32 = st.one_of(st.sampled_from(EDGES_32), st.integers(0, 2**32 - 1))
float_bits = st.one_of(st.sampled_from(FLOAT_EDGES), st.integers(0, 2**32 - 1))


def vectors(strategy: Any, count: int) -> Any:
    """`count` lists of 32 values."""
    return st.tuples(*(st.lists(strategy, min_size=32, max_size=32) for _ in range(count)))


def signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def number(kind: str, value: int) -> int:
    """Bits as the number that a type reads."""
    return signed(value, WIDTH[kind]) if kind[0] == "s" else value % (1 << WIDTH[kind])


def value_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def nearest(exact: Fraction) -> int:
    """The fp32 bits nearest to an exact value, ties to even, subnormals kept; the sign of zero is not told."""
    if exact == 0:
        return 0
    sign, size = (0x80000000, -exact) if exact < 0 else (0, exact)
    exponent = max(-126, size.numerator.bit_length() - size.denominator.bit_length() - 1)
    if size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    # a subnormal number lacks the leading 1 that the sum takes for a part of the exponent, and a carry adds one to it
    bits = (exponent + 126 << 23) + round(size / Fraction(2) ** (exponent - 23))
    return sign | min(bits, 0x7F800000)
