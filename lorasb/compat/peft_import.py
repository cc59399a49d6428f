"""An import hook that registers a method with PEFT right after PEFT is imported: `import peft` alone takes seconds."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def after_peft(register: Callable[[], None]) -> None:
    """Call `register` now if peft is imported already, else right after the first `import peft`."""
    # at its import by PEFT bitsandbytes warns of a kernel from the hub that lorasb does not use
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: "kernels-community" not in record.getMessage())
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        # first in line, or the regular finder would answer for peft
        sys.meta_path.insert(0, _PeftFinder(register))


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Has the other finders find peft, and its loader register the method."""

    def __init__(self, register: Callable[[], None]) -> None:
        self.register = register
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
            # not here: `importlib.util.find_spec("peft")` only asks whether peft is installed
            execute = functools.partial(self._execute, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        execute(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self.register()  # peft is complete now: `register_peft_method` can be called
