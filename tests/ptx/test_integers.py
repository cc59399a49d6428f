"""Each instruction on integers and bits against a definition of its own, in Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx.formats import TYPES, immediate
from ptx_bench import evaluate
from ptx_numbers import WIDTH, bits32, number


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("-1", "u32", 0xFFFFFFFF), ("0x7701U", "b32", 0x7701), ("7U", "u64", 7), ("-3", "s16", -3)],
)
def test_literals(text: str, kind: str, value: int) -> None:
    assert immediate(text, TYPES[kind]) == value


def divide(a: int, b: int) -> int:
    """Toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extract(kind: str, value: int, start: int, length: int) -> int:
    field = (value >> start) % (1 << length)
    return field - (1 << length) if kind == "s32" and length and value >> min(31, start + length - 1) & 1 else field


def permute(a: int, b: int, selector: int) -> int:
    pool, found = a.to_bytes(4, "little") + b.to_bytes(4, "little"), []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        found.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(found), "little")


RANGES: dict[str, st.SearchStrategy[int]] = {
    **{kind: bits32 if bits == 32 else st.integers(0, 2**bits - 1) for kind, bits in WIDTH.items()},
    "count": st.integers(0, 70),  # shifts beyond the width move everything out
    "place": st.integers(0, 31),
    "length": st.integers(0, 32),
}
# Instruction -> its operands, and its definition; the result has the first operand's type, or twice as many bits
OPERATIONS: dict[str, tuple[tuple[str, ...], Callable[..., int]]] = {
    "shl.b32": (("b32", "count"), lambda a, n: a << n),
    "shl.b64": (("b64", "count"), lambda a, n: a << n),
    "shr.u32": (("u32", "count"), lambda a, n: a >> n),
    "shr.s32": (("s32", "count"), lambda a, n: a >> n),
    "shr.s64": (("s64", "count"), lambda a, n: a >> n),
    "neg.s32": (("s32",), lambda a: -a),
    "prmt.b32": (("b32", "b32", "b32"), permute),
}
for kind in ("b16", "b32", "b64"):
    OPERATIONS |= {
        f"and.{kind}": ((kind, kind), lambda a, b: a & b),
        f"or.{kind}": ((kind, kind), lambda a, b: a | b),
        f"xor.{kind}": ((kind, kind), lambda a, b: a ^ b),
        f"not.{kind}": ((kind,), lambda a: ~a),
    }
for kind in ("s32", "u32"):
    OPERATIONS |= {
        f"add.{kind}": ((kind, kind), lambda a, b: a + b),
        f"sub.{kind}": ((kind, kind), lambda a, b: a - b),
        f"min.{kind}": ((kind, kind), min),
        f"max.{kind}": ((kind, kind), max),
        f"mul.lo.{kind}": ((kind, kind), lambda a, b: a * b),
        f"mul.hi.{kind}": ((kind, kind), lambda a, b: a * b >> 32),
        f"mul.wide.{kind}": ((kind, kind), lambda a, b: a * b),
        f"mad.lo.{kind}": ((kind, kind, kind), lambda a, b, c: a * b + c),
        f"mad.wide.{kind}": ((kind, kind, "b64"), lambda a, b, c: a * b + c),
        f"div.{kind}": ((kind, kind), divide),
        f"rem.{kind}": ((kind, kind), lambda a, b: a - divide(a, b) * b),
        f"bfe.{kind}": ((kind, "place", "length"), lambda a, start, length, kind=kind: extract(kind, a, start, length)),
    }


@pytest.mark.parametrize("opcode", OPERATIONS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_integers(opcode: str, data: st.DataObject) -> None:
    operands, definition = OPERATIONS[opcode]
    columns = [data.draw(st.lists(RANGES[kind], min_size=32, max_size=32)) for kind in operands]
    if opcode.startswith(("div", "rem")):  # by zero is not defined
        columns[1] = [value or 1 for value in columns[1]]
    result = WIDTH[operands[0]] * (2 if "wide" in opcode else 1)
    arrays = [np.array(column, TYPES[f"u{WIDTH[kind]}"]) for kind, column in zip(operands, columns, strict=True)]
    numbers = (map(number, operands, row) for row in zip(*columns, strict=True))
    want = [definition(*row) % 2**result for row in numbers]
    assert evaluate(opcode, *arrays, result=TYPES[f"u{result}"]).tolist() == want
