"""Private names and patches of other packages, by package; docs/compatibility.md is made from these tables.
Callers import the modules, not the names, so that a package and its registration hook may be imported in any order.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Private(NamedTuple):
    """A private name of another package."""

    # dotted, from an importable module; `()` after the class of an attribute that instances alone have:
    # `nn.Module()._forward_hooks`; or the file of a C++ header
    name: str
    use: str  # purpose
    absent: str  # what lorasb does if a release of the package no longer has the name
    fallback: object = None  # object that then replaces it; None where the caller has to do without one


def several(use: str, absent: str, *names: str) -> dict[str, Private]:
    """Names that share the use, by themselves."""
    return {name: Private(name, use, absent) for name in names}


def find(private: Private) -> Any:
    """The object with this name, or the fallback if the installed package does not have it."""
    parts = private.name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return found
    return private.fallback
