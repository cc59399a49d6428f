"""LoRA-SB adapters for Hugging Face models: `W = W0 + s·B·R·A` with B and A frozen and only R [r, r] trained.

`import lorasb` is light: it imports neither torch nor peft, transformers, triton or bitsandbytes, and uses no device.
Public names are imported at first use, and the PEFT method is registered as soon as peft is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .compat.peft_import import after_peft
from .constants import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from .app.prepare import demo_model
    from .backends import backend
    from .config.adapter import LoRASBConfig
    from .export.lora import export_lora
    from .export.weight_sync import adapter_delta, lora_of
    from .init import InitReport, first_step_lr, initialize, refresh
    from .layers.linear import LoRASBLinear, equivalent_gradient
    from .layers.linear4bit import Linear4bit, quantize
    from .optim import parameter_groups
    from .serving.bank import AdapterBank
    from .serving.basis_adapters import add_adapters
    from .serving.joint_basis import project, share_basis
    from .serving.training import (
        AdapterRowsCallback,
        AdapterRowsCollator,
        adapter_losses,
        adapter_parameter_groups,
        clip_by_adapter,
    )
    from .training.init_callback import InitCallback
    from .training.rate_trials import RateTrials, find_lr
    from .training.reinforcement import policy_loss, preference_loss, reward_batches
    from .tuner.patch import patch

__all__ = [
    "AdapterBank",
    "AdapterRowsCallback",
    "AdapterRowsCollator",
    "InitCallback",
    "InitReport",
    "Linear4bit",
    "LoRASBConfig",
    "LoRASBLinear",
    "RateTrials",
    "__version__",
    "adapter_delta",
    "adapter_losses",
    "adapter_parameter_groups",
    "add_adapters",
    "backend",
    "clip_by_adapter",
    "demo_model",
    "equivalent_gradient",
    "export_lora",
    "find_lr",
    "first_step_lr",
    "functional",
    "initialize",
    "lora_of",
    "optim",
    "parameter_groups",
    "patch",
    "policy_loss",
    "preference_loss",
    "project",
    "quantize",
    "refresh",
    "reward_batches",
    "share_basis",
]

# public name -> the module that defines it
_MODULE_OF = {
    "AdapterBank": "serving.bank",
    "AdapterRowsCallback": "serving.training",
    "AdapterRowsCollator": "serving.training",
    "adapter_losses": "serving.training",
    "adapter_parameter_groups": "serving.training",
    "add_adapters": "serving.basis_adapters",
    "clip_by_adapter": "serving.training",
    "InitCallback": "training.init_callback",
    "InitReport": "init",
    "Linear4bit": "layers.linear4bit",
    "LoRASBConfig": "config.adapter",
    "LoRASBLinear": "layers.linear",
    "RateTrials": "training.rate_trials",
    "backend": "backends",
    "demo_model": "app.prepare",
    "equivalent_gradient": "layers.linear",
    "export_lora": "export",
    "adapter_delta": "export",
    "lora_of": "export",
    "find_lr": "training.rate_trials",
    "first_step_lr": "init",
    "initialize": "init",
    "parameter_groups": "optim",
    "patch": "tuner.patch",
    "policy_loss": "training.reinforcement",
    "preference_loss": "training.reinforcement",
    "reward_batches": "training.reinforcement",
    "project": "serving.joint_basis",
    "share_basis": "serving.joint_basis",
    "refresh": "init",
    "quantize": "layers.linear4bit",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, at first use (PEP 562)."""
    if name in ("functional", "optim"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lorasb' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # later look-ups find it without this function
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    """Import the tuner, and hand it the data-free inits, which it must not import from `init`, a layer above.

    No module of lorasb is half-imported at this point: packages whose modules import peft (`layers`, `tuner`, ...)
    import it in their `__init__`, before any of their modules.
    """
    importlib.import_module(".tuner.model", __name__).register(_init_without_data)


def _init_without_data(*arguments: Any) -> Any:
    """`init.initialization.without_data`, imported at the first call: importing peft must not load `init`."""
    from .init.initialization import without_data

    return without_data(*arguments)


after_peft(_register)
