"""LoRA-SB adapters for Hugging Face models: `W = W0 + s·B·R·A` with B and A frozen and only R [r, r] trained.

`import lorasb` is light: it imports neither torch nor peft, transformers, triton or bitsandbytes, and uses no device.
Public names are imported at first use, and the PEFT method is registered as soon as peft is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

from .compat import after_peft
from .constants import VERSION


def _public_names() -> dict[str, str]:
    """Public name -> the module that defines it, from the lines `from MODULE import NAME as NAME` of `__init__.pyi`."""
    with open(f"{__file__.removesuffix('.py')}.pyi", encoding="utf-8") as table:
        lines = [line.split() for line in table]
    return {line[-1]: line[1] for line in lines if line[:1] == ["from"]}


__version__ = VERSION
_MODULE_OF = _public_names()
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, at first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lorasb' has no attribute {name!r}")
    if _MODULE_OF[name] == ".":
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value  # later look-ups find it without this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    """Import the tuner and pass it the data-free inits: it must not import `init`, a layer above, itself."""
    # No module of lorasb is half-imported here: packages whose modules import peft (`layers`, `tuner`, ...) import it
    # in their `__init__`, before any of their modules.
    importlib.import_module(".tuner.model", __name__).register(_init_without_data)


def _init_without_data(model: Any, config: Any, adapter: str, layers: Any) -> Any:
    """Run a data-free init; its modules are imported at the first call, as importing peft must not load `init`."""
    from .init.initialization import InitOptions, without_data

    return without_data(model, config, layers, InitOptions(adapter=adapter, seed=config.init_seed))


after_peft(_register)
