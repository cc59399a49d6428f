"""Former names of public functions: they work, and say once a call site what to write instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

REMOVED_IN = "0.4"


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Give the DeprecationWarning of a former name."""
    message = f"{old} is now {new}, and its former name goes with lorasb {REMOVED_IN}: write {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """A method under its former name."""

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        return getattr(self, new)(*arguments, **options)

    call.__name__, call.__doc__ = old, f"Former name of `{new}`."
    return call
