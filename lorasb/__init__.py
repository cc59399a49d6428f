"""LoRA-SB adapters for Hugging Face models: `W = W0 + s·B·R·A` with B and A frozen and only R [r, r] trained.

`import lorasb` is light: it imports no peft, transformers, triton or bitsandbytes and touches no device. What needs
them is imported at first use, and the PEFT method is registered as soon as somebody imports peft.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _peft_registration
from ._version import __version__
from .patch import patch

if TYPE_CHECKING:
    from .backends import backend
    from .callback import InitCallback
    from .config import LoRASBConfig
    from .equivalent import equivalent_gradient
    from .export import export_lora
    from .groups import parameter_groups
    from .init import InitReport, first_step_lr, initialize
    from .linear import LoRASBLinear
    from .linear4bit import Linear4bit
    from .quantizing import quantize

__all__ = [
    "InitCallback",
    "InitReport",
    "Linear4bit",
    "LoRASBConfig",
    "LoRASBLinear",
    "__version__",
    "backend",
    "equivalent_gradient",
    "export_lora",
    "first_step_lr",
    "functional",
    "initialize",
    "parameter_groups",
    "patch",
    "quantize",
]

_HOMES = {
    "InitCallback": "callback",
    "InitReport": "init",
    "Linear4bit": "linear4bit",
    "LoRASBConfig": "config",
    "LoRASBLinear": "linear",
    "backend": "backends",
    "equivalent_gradient": "equivalent",
    "export_lora": "export",
    "first_step_lr": "init",
    "initialize": "init",
    "parameter_groups": "groups",
    "quantize": "quantizing",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home at first use."""
    if name == "functional":
        return importlib.import_module(".functional", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'lorasb' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


_peft_registration.install()
