"""Triton's interpreter replaces the functions of triton.language once a launch, not at every call inside a kernel.

It walks the whole language again whenever a kernel calls a @jit function, though the launch has replaced everything
already: a quarter of the time of a test with dropout, whose masks are such functions (28 of 110 s under a profiler, on a
Zen 3 with AVX2).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's function that does it, where this Triton has that function."""
    original: Callable[[FunctionType], Any] | None = getattr(interpreter, "_patch_lang", None)
    if original is not None and not hasattr(original, "replaced"):
        once = _OnceALaunch(original)
        interpreter._patch_lang = once


class _OnceALaunch:
    """`_patch_lang` for a launch, whose scope is restored at its end; nothing for what it calls."""

    replaced: frozenset[str] = frozenset()

    def __init__(self, original: Callable[[FunctionType], Any]) -> None:
        self.original = original

    def __call__(self, function: FunctionType) -> Any:
        """The scope of what was replaced for a function."""
        modules = frozenset(
            value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core
        )
        if self.replaced and modules <= self.replaced:
            return None  # a call inside a kernel, whose caller drops the scope
        scope = self.original(function)
        if not self.replaced:
            restore = scope.restore
            scope.restore = lambda: self._end(restore)
        self.replaced |= modules
        return scope

    def _end(self, restore: Callable[[], None]) -> None:
        self.replaced = frozenset()
        restore()
