"""Each instruction on integers and bits against a definition of its own, in Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx.formats import TYPES, immediate
from ptx_bench import evaluate
from ptx_numbers import WIDTH, bits32, number, signed, vectors


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("-1", "u32", 0xFFFFFFFF), ("0x7701U", "b32", 0x7701), ("7U", "u64", 7), ("-3", "s16", -3)],
)
def test_literals(text: str, kind: str, value: int) -> None:
    assert immediate(text, TYPES[kind]) == value


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add": lambda k, a, b: a + b,
    "sub": lambda k, a, b: a - b,
    "mul.lo": lambda k, a, b: a * b,
    "mul.hi": lambda k, a, b: (a * b) >> WIDTH[k],
    "min": lambda k, a, b: min(a, b),
    "max": lambda k, a, b: max(a, b),
    "and": lambda k, a, b: a & b,
    "or": lambda k, a, b: a | b,
    "xor": lambda k, a, b: a ^ b,
}


@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize("operation", ["add", "sub", "mul.lo", "mul.hi", "min", "max"])
@given(given_bits=vectors(bits32, 2))
@settings(max_examples=15, deadline=None)
def test_integers(kind: str, operation: str, given_bits: tuple[list[int], list[int]]) -> None:
    a, b = (np.array(bits, np.uint32) for bits in given_bits)
    found = evaluate(f"{operation}.{kind}", a, b)
    want = [
        INTEGER[operation](kind, number(kind, x), number(kind, y)) % 2**32 for x, y in zip(*given_bits, strict=True)
    ]
    assert found.tolist() == want


@pytest.mark.parametrize("operation", ["and", "or", "xor"])
@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_logic(kind: str, operation: str, data: st.DataObject) -> None:
    lists = data.draw(vectors(st.integers(0, 2 ** WIDTH[kind] - 1), 2))
    a, b = (np.array(bits, TYPES[kind]) for bits in lists)
    assert evaluate(f"{operation}.{kind}", a, b).tolist() == [
        INTEGER[operation](kind, x, y) for x, y in zip(*lists, strict=True)
    ]
    assert evaluate(f"not.{kind}", a).tolist() == [~x % 2 ** WIDTH[kind] for x in lists[0]]


@pytest.mark.parametrize("kind", ["s32", "u32"])
@given(given_bits=vectors(bits32, 3))
@settings(max_examples=15, deadline=None)
def test_wide_products_and_sums(kind: str, given_bits: tuple[list[int], ...]) -> None:
    a, b, c = (np.array(bits, np.uint32) for bits in given_bits)
    products = [number(kind, x) * number(kind, y) for x, y in zip(*given_bits[:2], strict=True)]
    assert evaluate(f"mul.wide.{kind}", a, b, result=np.uint64).tolist() == [p % 2**64 for p in products]
    addend = c.astype(np.uint64) << np.uint64(16)
    want = [(p + int(x)) % 2**64 for p, x in zip(products, addend, strict=True)]
    assert evaluate(f"mad.wide.{kind}", a, b, addend, result=np.uint64).tolist() == want
    low = [(p + x) % 2**32 for p, x in zip(products, given_bits[2], strict=True)]
    assert evaluate(f"mad.lo.{kind}", a, b, c).tolist() == low


@pytest.mark.parametrize("kind", ["s32", "u32"])
@given(given_bits=vectors(bits32, 2))
@settings(max_examples=15, deadline=None)
def test_division_goes_toward_zero(kind: str, given_bits: tuple[list[int], list[int]]) -> None:
    pairs = [(number(kind, x), number(kind, y) or 1) for x, y in zip(*given_bits, strict=True)]
    a, b = (np.array([value % 2**32 for value in column], np.uint32) for column in zip(*pairs, strict=True))
    assert evaluate(f"div.{kind}", a, b).tolist() == [toward_zero(x, y) % 2**32 for x, y in pairs]
    assert evaluate(f"rem.{kind}", a, b).tolist() == [(x - toward_zero(x, y) * y) % 2**32 for x, y in pairs]


@pytest.mark.parametrize(
    ("kind", "operation"), [("b32", "shl"), ("u32", "shr"), ("s32", "shr"), ("b64", "shl"), ("s64", "shr")]
)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_shifts_beyond_the_width_move_everything_out(kind: str, operation: str, data: st.DataObject) -> None:
    bits = WIDTH[kind]
    values, counts = data.draw(
        st.tuples(
            st.lists(st.integers(0, 2**bits - 1), min_size=32, max_size=32),
            st.lists(st.integers(0, 70), min_size=32, max_size=32),
        )
    )
    found = evaluate(f"{operation}.{kind}", np.array(values, TYPES[f"u{bits}"]), np.array(counts, np.uint32))
    want = [
        (x << n if operation == "shl" else number(kind, x) >> n) % 2**bits for x, n in zip(values, counts, strict=True)
    ]
    assert found.tolist() == want


@pytest.mark.parametrize("kind", ["s32", "u32"])
@given(
    given_values=st.tuples(
        st.lists(bits32, min_size=32, max_size=32),
        st.lists(st.integers(0, 31), min_size=32, max_size=32),
        st.lists(st.integers(0, 32), min_size=32, max_size=32),
    )
)
@settings(max_examples=20, deadline=None)
def test_bit_fields(kind: str, given_values: tuple[list[int], list[int], list[int]]) -> None:
    found = evaluate(f"bfe.{kind}", *(np.array(values, np.uint32) for values in given_values))
    for x, start, length, got in zip(*given_values, found.tolist(), strict=True):
        wide = signed(x, 32) if kind == "s32" else x
        field = (wide >> start) % (1 << length)
        if kind == "s32" and length and (x >> min(31, start + length - 1)) & 1:
            field -= 1 << length
        assert got == field % 2**32


@given(given_bits=vectors(bits32, 3))
@settings(max_examples=20, deadline=None)
def test_bytes_are_permuted(given_bits: tuple[list[int], ...]) -> None:
    found = evaluate("prmt.b32", *(np.array(bits, np.uint32) for bits in given_bits))
    for a, b, selector, got in zip(*given_bits, found.tolist(), strict=True):
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        want = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = pool[nibble & 7]
            want.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        assert got == int.from_bytes(bytes(want), "little")
