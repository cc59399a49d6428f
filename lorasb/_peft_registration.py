"""Registers LoRA-SB with PEFT the moment PEFT is imported, without importing it: `import peft` alone takes seconds."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def install() -> None:
    """Register now where peft is there already, else right after the first `import peft`."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    """Import the tuner and hand it what stands above it.

    Nothing of ours is half-imported here: the packages whose modules import peft (`layers`, `tuner`, ...) import it in
    their `__init__`, before any of their modules.
    """
    importlib.import_module("lorasb.tuner.model").register(_init_without_data)


def _init_without_data(*arguments: Any) -> Any:
    from .init.initialization import without_data

    return without_data(*arguments)


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Finds peft by the other finders and wraps its loader; looking for it (`find_spec`) is not importing it."""

    def __init__(self) -> None:
        self.looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "peft" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec("peft")
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Runs the real loader, then registers and takes the finder away."""

    def __init__(self, loader: importlib.abc.Loader, finder: _PeftFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()
