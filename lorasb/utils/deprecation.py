"""Deprecation of renamed public functions: former names keep working, with a DeprecationWarning that names the new."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

REMOVED_IN = "0.4"  # version of lorasb


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Issue the DeprecationWarning for a former name; `stacklevel` has to point to the line that uses it."""
    message = f"{old} is deprecated and will be removed in lorasb {REMOVED_IN}: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """A method `old` that warns and calls `new`."""

    def call(self: Any, *arguments: Any, **options: object) -> Any:
        # By name on the instance, so that overrides of the new method are called.
        warn_renamed(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        return getattr(self, new)(*arguments, **options)

    call.__name__, call.__doc__ = old, f"Former name of `{new}`."
    return call
