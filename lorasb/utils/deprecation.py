"""Deprecation of renamed public functions: former names keep working, with a DeprecationWarning that names the new."""

from __future__ import annotations

import warnings
from collections.abc import Callable

REMOVED_IN = "0.4"  # version of lorasb


def warn_renamed(old: str, new: str) -> None:
    """Issue the DeprecationWarning for a former name, at the line that uses it: two calls up."""
    message = f"{old} is deprecated and will be removed in lorasb {REMOVED_IN}: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def renamed_method(old: str, new: str) -> Callable[..., object]:
    """A method `old` that warns and calls `new`."""

    def call(self: object, *arguments: object, **options: object) -> object:
        # By name on the instance, so that overrides of the new method are called.
        warn_renamed(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        return getattr(self, new)(*arguments, **options)

    call.__name__, call.__doc__ = old, f"Former name of `{new}`."
    return call
