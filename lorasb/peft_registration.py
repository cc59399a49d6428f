"""Registers LoRA-SB with PEFT right after PEFT is imported, by an import hook: `import peft` alone takes seconds."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def install() -> None:
    """Register now if peft is imported already, else right after the first `import peft`."""
    _quiet_bitsandbytes()
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        # first in line, or the regular finder would answer for peft
        sys.meta_path.insert(0, _PeftFinder())


def _quiet_bitsandbytes() -> None:
    """Drop bitsandbytes' warning, at its import by PEFT, of a kernel from the hub that lorasb does not use."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: "kernels-community" not in record.getMessage())


def _register() -> None:
    """Import the tuner, and hand it the data-free inits, which it must not import from `init`, a layer above.

    No module of lorasb is half-imported at this point: packages whose modules import peft (`layers`, `tuner`, ...)
    import it in their `__init__`, before any of their modules.
    """
    importlib.import_module("lorasb.tuner.model").register(_init_without_data)


def _init_without_data(*arguments: Any) -> Any:
    """`lorasb.init.initialization.without_data`, imported at the first call: importing peft must not load `init`."""
    from .init.initialization import without_data

    return without_data(*arguments)


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find peft and wraps its loader.

    It registers in the loader, not in `find_spec`: `importlib.util.find_spec("peft")` asks whether peft is installed,
    without importing it.
    """

    def __init__(self) -> None:
        self.searching = False  # True while the other finders are asked, which asks this one too

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
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Runs peft's own loader, then removes the finder and registers."""

    def __init__(self, loader: importlib.abc.Loader, finder: _PeftFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # importlib.reload and resource readers take the loader from the spec
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()  # peft is complete now: `register_peft_method` can be called
