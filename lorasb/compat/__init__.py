"""Private names and patches of other packages, by package, and the hook that registers a method once PEFT is imported.

docs/compatibility.md is made from the tables. Callers import the modules, not the names, so that a package and its
registration hook may be imported in any order.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple


class Private(NamedTuple):
    """A private name of another package."""

    # dotted path from an importable module; `()` follows the class of an attribute that only instances have:
    # `nn.Module()._forward_hooks`; or the path of a C++ header
    name: str
    use: str  # purpose
    absent: str  # what lorasb does if a release of the package no longer has the name
    fallback: object = None  # object that then replaces it; None if the caller has to do without


def several(use: str, absent: str, *names: str) -> dict[str, Private]:
    """Return a `Private` for each of these names, which share the use."""
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


def extend(owner: object, name: str, call: Callable[..., object]) -> None:
    """Replace a module's function or a class's method, if it exists, by `call`, which gets the original first; once."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "of_lorasb"):
        return

    @functools.wraps(original)
    def extended(*arguments: object, **options: object) -> object:
        return call(original, *arguments, **options)

    extended.of_lorasb = True  # type: ignore[attr-defined]
    setattr(owner, name, extended)


def after_peft(register: Callable[[], None]) -> None:
    """Call `register` now if peft is imported already, else right after the first `import peft`."""
    # when PEFT imports it, bitsandbytes warns about a kernel from the Hub that lorasb does not use
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: "kernels-community" not in record.getMessage())
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        # first in line, or the regular finder would answer for peft
        sys.meta_path.insert(0, _PeftFinder(register))


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find peft, and makes its loader register the method."""

    def __init__(self, register: Callable[[], None]) -> None:
        self.register = register
        self.searching = False  # True while the other finders search, as that calls this one, too

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            # do not register here: `importlib.util.find_spec("peft")` only checks whether peft is installed
            execute = functools.partial(self._execute, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self.register()  # peft is complete now: `register_peft_method` can be called
