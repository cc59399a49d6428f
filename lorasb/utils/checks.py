"""Checks of values that users and their files give: learning rates, and patterns that are quick to match."""

from __future__ import annotations

import re
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

MAX_LR = 1e4  # a mistyped exponent (1e38) would end as Inf after hours, or in the first step
MAX_REPEATS = 3  # *, + and {m,n} of a pattern: n characters are matched within about n³ / 6 steps
# An escape, a class, the end of a group, or a repeat; anything else is one character.
TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\)|[*+]|\{\d*,?\d*\}|.", re.DOTALL)
REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


def check_pattern(pattern: str, where: str, repeats: int = MAX_REPEATS) -> None:
    """Check a pattern that `re` is to match.

    A repeated group, as in `(a+)+`, can take time that doubles with each character of a name. Every repeat of a single
    character or class adds one factor of the name's length.

    Args:
        pattern: a regular expression.
        where: its place, for the message.
        repeats: how many repeats it may have.

    Raises:
        ValueError: it is no regular expression, it repeats a group, or it has too many repeats.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: expected a regular expression, got {pattern!r} ({error})") from None
    count, before = 0, ""
    for token in TOKEN.findall(pattern):
        if REPEAT.fullmatch(token):
            count += 1
            if before == ")":
                raise ValueError(
                    f"{where}: expected no repeated group, which may take forever to match, got {pattern!r}: repeat a "
                    "single character or class ([a-z]*), or give a list of names"
                )
        before = token
    if count > repeats:
        raise ValueError(
            f"{where}: expected at most {repeats} repeats (*, +, {{m,n}}), got {count} in {pattern!r}: shorten it, or "
            "give a list of names"
        )


def matches(value: Any, hint: Any) -> bool:
    """Return True if a JSON value has the type of an annotation; lists stand for sets and tuples."""
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
    if hint in (None, type(None)):
        return value is None
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_lr(lr: float, what: str = "learning rate") -> None:
    """Raise a ValueError unless a learning rate is positive and at most 1e4."""
    if not 0 < lr <= MAX_LR:
        raise ValueError(f"expected a positive {what}, at most {MAX_LR:g}, got {lr!r}")
