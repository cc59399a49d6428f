"""Checks of values from users and their files: rates, sizes in bytes, patterns that are quick to match."""

from __future__ import annotations

import difflib
import importlib
import math
import re
import sys
import types
from collections.abc import Collection
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

# The parser of `re`, a top-level module in Python 3.10.
_parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_LR = 1e4  # a mistyped exponent (1e38) would end as Inf after hours, or in the first step
MAX_REPEATS = 4.0  # matching time may grow by this power of a name's length n: about n⁴ / 24 steps
# A repeat of digits finds few in a name, and an optional part only doubles the ways to match: both count as a quarter.
SMALL = 0.25
MAX_DEPTH = 200  # of a parsed pattern: about a hundred nested groups
# Bytes per unit, by its upper-case name: decimal and binary prefixes.
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Items that match one character: repeating one multiplies the matching time by a name's length, while repeating a
# group, as in `(a+)+`, can double it per character.
SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY")


def check_pattern(pattern: str, where: str, repeats: float = MAX_REPEATS) -> None:
    """Raise a ValueError for a pattern that is not a regular expression or may match module names too slowly."""
    try:
        re.compile(pattern)
        count = _repeats(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: expected a regular expression, got {pattern!r} ({error})") from None
    if math.isinf(count):
        raise ValueError(
            f"{where}: expected no repeated group, which may take forever to match, got {pattern!r}: repeat a single "
            "character or class ([a-z]*), or give a list of names"
        )
    if count > repeats:
        raise ValueError(
            f"{where}: expected at most {repeats:g} repeats (*, +, {{m,n}}) in a row, got {count:g} in {pattern!r}: "
            "shorten it, or give a list of names"
        )


def _repeats(parsed: Any, depth: int = 0) -> float:
    """Number of repeats on the most expensive path through a parsed pattern; Inf if it repeats a group."""
    if depth > MAX_DEPTH:  # not left to the interpreter's limit, which other packages raise
        raise RecursionError("its groups are nested too deeply")
    if not isinstance(parsed, _parser.SubPattern):
        parts = parsed if isinstance(parsed, list | tuple) else ()
        return sum(_repeats(part, depth + 1) for part in parts)
    total = 0.0
    for kind, value in parsed:
        name = str(kind)
        if name == "BRANCH":
            total += max(_repeats(branch, depth + 1) for branch in value[1])
        elif "REPEAT" in name:
            low, high, body = value
            single = len(body) == 1 and str(body[0][0]) in SINGLE
            if not single and high > 1:
                return math.inf
            digits = single and str(body[0]) in DIGITS
            total += (SMALL if high <= 1 or digits else float(low != high)) + _repeats(body, depth + 1)
        else:
            total += _repeats(value, depth + 1)
    return total


DIGITS = {str(_parser.parse(text)[0]) for text in (r"\d", "[0-9]", r"[\d]")}


def matches(value: Any, hint: Any) -> bool:
    """True if a JSON value has the type of an annotation; lists match sets and tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return isinstance(value, list | set | tuple) and all(matches(v, a) for v in value for a in arguments[:1])
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            return False
        key, item = arguments or (Any, Any)
        return all(matches(k, key) and matches(v, item) for k, v in value.items())
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    if isinstance(value, bool):  # which Python counts as an int
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def check_lr(lr: float, what: str = "learning rate", zero: bool = False) -> None:
    """Raise a ValueError unless a learning rate is positive, or 0 where that is allowed, and at most 1e4."""
    if isinstance(lr, str) or (not 0 < lr <= MAX_LR and not (zero and lr == 0)):
        raise ValueError(f"expected a positive {what}, at most {MAX_LR:g}, got {lr!r}")


def parse_size(size: float | str | None) -> float | None:
    """Bytes of a size like 6e9, "6GB" or "512 MiB"; None for None; a ValueError if it is no positive size."""
    if size is None:
        return None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(f"expected a size like '6GB' or a number of bytes, got {size!r}")
        size = float(match[1]) * UNITS[match[2].upper()]
    if not size > 0:  # true for NaN as well
        raise ValueError(f"expected a positive number of bytes, got {size!r}")
    return float(size)


def nearest(name: str, known: Collection[str], otherwise: str = "--help-all lists them", cutoff: float = 0.7) -> str:
    """Return the end of an error message: the known name closest to an unknown one, or where to find all names."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return f": did you mean {near[0]!r}?" if near else f": {otherwise}"
