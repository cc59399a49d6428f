"""Patterns match within a bounded time; bad rates and sizes are refused."""

import math
import re
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb.utils.checks import check_lr, check_pattern, parse_size

GOOD = [
    r".*language_model.*layers\.\d+\..*(q_proj|v_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:gate_proj))",
    r".*layers\.\d+\.attn\.q|.*layers\.\d+\.attn\.k|.*layers\.\d+\.attn\.v|.*layers\.\d+\.mlp\.up",
    r".*(query|value|output\.dense)",
    r"model\.layers\.(0|1)\..*(q|v)_proj",
    "[^)*+]*",
    r"a\)\*+",
    "x{2}",
    "(a.*)?b",
]
BAD = [
    ".?" * 60 + "Z", "(?x)(.+) +Z", "(?:.{2,9})*", "(a+)+", "(.*.*)*zzz(a+)+$", "(a|a)*$", "(ab){2,9}", "(", "[", "*a", "(?:a?)*",
    r"([)]a)+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", GOOD)
def test_patterns_that_people_write_pass(pattern: str) -> None:
    check_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_can_take_forever_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="target_modules: expected"):
        check_pattern(pattern, "target_modules")


def test_deep_nesting_is_refused_whatever_the_recursion_limit() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        check_pattern("(" * 50 + "a" + ")" * 50, "target_modules")
        with pytest.raises(ValueError, match=r"target_modules: expected .*nested too deeply"):
            check_pattern("(" * 500 + ")" * 500, "target_modules")
    finally:
        sys.setrecursionlimit(limit)


def test_too_many_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 4 repeats .* got 5"):
        check_pattern(".*a.*b.*c.*d.*", "target_modules")


@given(st.lists(st.sampled_from([".*", "a", "(", ")", "|", "[ab]*", "a+", "?", "{2,}", "\\.", "(a)"]), max_size=8))
def test_what_passes_is_quick_on_a_long_name(parts: list[str]) -> None:
    pattern = "".join(parts)
    try:
        check_pattern(pattern, "here")
    except ValueError:
        return
    started = time.perf_counter()
    re.match(pattern + "z$", "a" * 60)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf, 1e38, "Auto"])
def test_a_rate_that_is_none_is_refused(lr: Any) -> None:
    with pytest.raises(ValueError, match="expected a positive learning rate, at most 10000"):
        check_lr(lr)


@pytest.mark.parametrize(
    ("text_", "size"), [("6GB", 6e9), ("512 MiB", 512 * 2**20), (1e6, 1e6), ("3", 3.0), (None, None), ("1.5kb", 1500.0)]
)
def test_a_size_is_a_number_with_or_without_a_unit(text_: Any, size: float | None) -> None:
    assert parse_size(text_) == size


@pytest.mark.parametrize("text_", ["1.2.3GB", "GB", "-1", 0, -1.0, float("nan"), "6 apples", "6TB", "much"])
def test_what_is_no_size_is_refused(text_: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a size like '6GB'|expected a positive number of bytes"):
        parse_size(text_)
