"""Each instruction, on numbers and bits, against an independent definition in Python's integers and exact fractions."""

import math
import operator
import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_kernels import evaluate

from benchmarks.kernels.ptx.formats import TYPES, immediate

EDGES_32 = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE)
FLOAT_EDGES = (
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF,
    0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x33800000, 0x3F7FFFFF,
    0x4B800000, 0x34000000, 0x477FE000, 0x477FF000, 0x38800000,
)  # fmt: skip
WIDTH = {f"{kind}{bits}": bits for kind in "sub" for bits in (16, 32, 64)}
WIDTH |= {"f32": 32, "count": 32, "place": 32, "length": 32}  # the last three are ranges of a u32
EDGES = {"f32": FLOAT_EDGES, "s32": EDGES_32, "u32": EDGES_32, "b32": EDGES_32}
# operands are below these; shifts beyond the width shift every bit out
LIMITS = {kind: 2**bits for kind, bits in WIDTH.items()} | {"count": 71, "place": 32, "length": 33}
NUMBERS = st.randoms(use_true_random=True)  # seeded by hypothesis; drawing each number with it takes ten times as long


def column(kind: str, numbers: random.Random) -> list[int]:
    """Operands of the 32 threads, half of them edge cases if the type has any."""
    drawn, edges = [numbers.randrange(LIMITS[kind]) for _ in range(32)], EDGES.get(kind)
    return [numbers.choice(edges) if edges and numbers.random() < 0.5 else one for one in drawn]


def number(kind: str, bits: int) -> int:
    """Bits as the integer that a type reads; for fp32, the bits themselves."""
    return bits - (1 << WIDTH[kind]) if kind[0] == "s" and bits >> WIDTH[kind] - 1 else bits


def value_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def nearest(exact: Fraction) -> int:
    """The bits of the fp32 number nearest to an exact value: ties to even, subnormals allowed; zero is positive."""
    if exact == 0:
        return 0
    sign, size = (0x80000000, -exact) if exact < 0 else (0, exact)
    exponent = max(-126, size.numerator.bit_length() - size.denominator.bit_length() - 1)
    if size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    # The leading 1 adds one to the exponent field: a subnormal number has none, and a carry from rounding adds another.
    bits = (exponent + 126 << 23) + round(size / Fraction(2) ** (exponent - 23))
    return sign | min(bits, 0x7F800000)


def divide(a: int, b: int) -> int:
    """a / b, rounded toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extract(value: int, start: int, length: int, is_signed: bool) -> int:
    field = (value >> start) % (1 << length)
    return field - (1 << length) if is_signed and length and value >> min(31, start + length - 1) & 1 else field


def permute(a: int, b: int, selector: int) -> int:
    pool, found = a.to_bytes(4, "little") + b.to_bytes(4, "little"), []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        found.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(found), "little")


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


def chosen(compare: Callable[[float, float], bool], on_nan: bool, a: int, b: int) -> int:
    """The first operand where the comparison holds, else the second."""
    x, y = value_of(a), value_of(b)
    return a if (on_nan if math.isnan(x) or math.isnan(y) else compare(x, y)) else b


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
    """Round to tf32, ties away from zero."""
    if not math.isfinite(value_of(bits)):
        return bits
    return (bits & 0xFFFFE000) + (0x2000 if bits & 0x1000 else 0)


def to_s32(bits: int) -> int:
    """Round toward zero and clamp; NaN becomes zero."""
    return 0 if math.isnan(value_of(bits)) else int(max(-(2**31), min(2**31 - 1, value_of(bits))))


# Instruction -> its operands, the bits of its result, and its definition: an integer, or the value of an fp32 result
OPERATIONS: dict[str, tuple[Sequence[str], int, Callable[..., float]]] = {
    "shl.b32": (("b32", "count"), 32, lambda a, n: a << n),
    "shl.b64": (("b64", "count"), 64, lambda a, n: a << n),
    "shr.u32": (("u32", "count"), 32, lambda a, n: a >> n),
    "shr.s32": (("s32", "count"), 32, lambda a, n: a >> n),
    "shr.s64": (("s64", "count"), 64, lambda a, n: a >> n),
    "neg.s32": (("s32",), 32, operator.neg),
    "prmt.b32": (("b32", "b32", "b32"), 32, permute),
    "bfe.s32": (("s32", "place", "length"), 32, partial(extract, is_signed=True)),
    "bfe.u32": (("u32", "place", "length"), 32, partial(extract, is_signed=False)),
    "add.rn.f32": (("f32", "f32"), 32, partial(rounded_once, operator.add)),
    "mul.rn.f32": (("f32", "f32"), 32, partial(rounded_once, operator.mul)),
    "fma.rn.f32": (("f32", "f32", "f32"), 32, partial(rounded_once, lambda a, b, c: a * b + c)),
    "min.f32": (("f32", "f32"), 32, partial(extreme, min)),
    "max.f32": (("f32", "f32"), 32, partial(extreme, max)),
    "neg.f32": (("f32",), 32, lambda bits: bits ^ 0x80000000),
    "abs.f32": (("f32",), 32, lambda bits: bits & 0x7FFFFFFF),
    "cvt.rn.f16.f32": (("f32",), 16, to_f16),
    "cvt.rn.bf16.f32": (("f32",), 16, to_bf16),
    "cvt.rn.f16x2.f32": (("f32", "f32"), 32, lambda high, low: to_f16(high) << 16 | to_f16(low)),
    "cvt.rn.bf16x2.f32": (("f32", "f32"), 32, lambda high, low: to_bf16(high) << 16 | to_bf16(low)),
    "cvt.rna.tf32.f32": (("f32",), 32, to_tf32),
    "cvt.rzi.s32.f32": (("f32",), 32, to_s32),
    "cvt.rn.f32.s32": (("s32",), 32, lambda a: nearest(Fraction(a))),
    "cvt.rn.f32.u32": (("u32",), 32, lambda a: nearest(Fraction(a))),
    "cvt.f32.f16": (("b16",), 32, lambda a: struct.unpack("<e", a.to_bytes(2, "little"))[0]),
    "cvt.f32.bf16": (("b16",), 32, lambda a: value_of(a << 16)),
    "cvt.u32.u16": (("u16",), 32, int),
    "cvt.s64.s32": (("s32",), 64, int),
    "cvt.u64.u32": (("u32",), 64, int),
    "cvt.u32.u64": (("u64",), 32, int),
    "cvt.u16.u32": (("u32",), 16, int),
}
for kind in ("b16", "b32", "b64"):
    OPERATIONS |= {
        f"and.{kind}": ((kind, kind), WIDTH[kind], operator.and_),
        f"or.{kind}": ((kind, kind), WIDTH[kind], operator.or_),
        f"xor.{kind}": ((kind, kind), WIDTH[kind], operator.xor),
        f"not.{kind}": ((kind,), WIDTH[kind], operator.inv),
    }
for kind in ("s32", "u32"):
    OPERATIONS |= {
        f"add.{kind}": ((kind, kind), 32, operator.add),
        f"sub.{kind}": ((kind, kind), 32, operator.sub),
        f"min.{kind}": ((kind, kind), 32, min),
        f"max.{kind}": ((kind, kind), 32, max),
        f"mul.lo.{kind}": ((kind, kind), 32, operator.mul),
        f"mul.hi.{kind}": ((kind, kind), 32, lambda a, b: a * b >> 32),
        f"mul.wide.{kind}": ((kind, kind), 64, operator.mul),
        f"mad.lo.{kind}": ((kind, kind, kind), 32, lambda a, b, c: a * b + c),
        f"mad.wide.{kind}": ((kind, kind, "b64"), 64, lambda a, b, c: a * b + c),
        f"div.{kind}": ((kind, kind), 32, divide),
        f"rem.{kind}": ((kind, kind), 32, lambda a, b: a - divide(a, b) * b),
    }
for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    for suffix, on_nan in (("", False), ("u", True)):
        comparison = f"setp.{name}{suffix}.f32 %p1, %x0, %x1;\nselp.b32"
        OPERATIONS[comparison] = ("f32", "f32"), 32, partial(chosen, getattr(operator, name), on_nan)


def check(opcode: str, columns: Sequence[Sequence[int]]) -> None:
    kinds, width, definition = OPERATIONS[opcode]
    arrays = [np.array(column, TYPES[f"u{WIDTH[kind]}"]) for kind, column in zip(kinds, columns, strict=True)]
    found = evaluate(opcode, *arrays, result=TYPES[f"u{width}"], extra="%p1" if "%p1" in opcode else "").tolist()
    for *operands, got in zip(*columns, found, strict=True):
        want = definition(*map(number, kinds, operands))
        if isinstance(want, int):
            assert got == want % 2**width, list(map(hex, operands))
        else:  # the bits of a NaN, and the sign of zero, are not defined
            assert value_of(got) == want or (math.isnan(want) and math.isnan(value_of(got))), list(map(hex, operands))


@pytest.mark.parametrize("opcode", OPERATIONS)
@given(numbers=NUMBERS)
@settings(max_examples=40, deadline=None)
def test_instructions(opcode: str, numbers: random.Random) -> None:
    columns = [column(kind, numbers) for kind in OPERATIONS[opcode][0]]
    if opcode.startswith(("div", "rem")):  # division by zero is not defined
        columns[1] = [value or 1 for value in columns[1]]
    check(opcode, columns)


def test_a_double_rounding_is_none() -> None:
    """a·b + c that fp64 cannot represent; one just above the midpoint of two fp32 numbers, and one at it."""
    one, above = 0x3F800000, 0x3F800001
    for operands in ((above, above, 0x21800000), (one, 0x33800001, one), (one, 0x33800000, one)):
        check("fma.rn.f32", [[bits] * 32 for bits in operands])


@given(numbers=NUMBERS)
@settings(max_examples=10, deadline=None)
def test_pairs_are_computed_like_two_numbers(numbers: random.Random) -> None:
    columns = np.array([column("f32", numbers) for _ in range(6)], np.uint32)
    pairs = [np.stack(columns[i : i + 2], 1).copy().view(np.uint64)[:, 0] for i in (0, 2, 4)]
    for opcode, count in (("add.rn", 2), ("mul.rn", 2), ("fma.rn", 3)):
        found = evaluate(f"{opcode}.f32x2", *pairs[:count]).view(np.uint32).reshape(32, 2)
        for half in range(2):
            alone = evaluate(f"{opcode}.f32", *columns[half : 2 * count : 2])
            assert np.array_equal(found[:, half], alone)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("-1", "u32", 0xFFFFFFFF), ("0x7701U", "b32", 0x7701), ("7U", "u64", 7), ("-3", "s16", -3)],
)
def test_literals(text: str, kind: str, value: int) -> None:
    assert immediate(text, TYPES[kind]) == value
