"""`lorasb.patch`: replace a model's linear layers by `LoRASBLinear`. Imports peft and torch only when called."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from ..config.adapter import LoRASBConfig


def patch(
    model: nn.Module, config: LoRASBConfig | None = None, *, adapter_name: str = "default", **fields: Any
) -> PeftModel:
    """Adapt a model: its target linears become `LoRASBLinear`, everything else is frozen.

    The same as `peft.get_peft_model(model, LoRASBConfig(...))`, with the task type inferred from the model's class.
    The model is changed in place, and left as it was on an error. No dtype is changed; a log line says what a 16-bit
    dtype costs that this CPU does not multiply.

    Args:
        model: a transformers model, or any module with `nn.Linear` layers.
        config: a `LoRASBConfig`, or None.
        adapter_name: name of the adapter.
        **fields: fields of `LoRASBConfig` instead of `config` (`r=96`, `target_modules=[...]`, ...).

    Returns:
        A `peft.PeftModel`. Call `lorasb.initialize(model, dataloader, lr=...)` next.

    Raises:
        TypeError: unknown fields, or both a config and fields.
        ValueError: an adapted or compiled model, no target matched, or a rank that a layer cannot have.
    """
    import peft

    from ..config.adapter import LoRASBConfig, infer_task_type
    from ..utils import precision

    if isinstance(model, peft.PeftModel):
        raise ValueError("expected a model without adapters, got a peft.PeftModel: use model.add_adapter or unload it")
    # _orig_mod: the wrapper of torch.compile(model); _compiled_call_impl: model.compile(), in place
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "expected a model that is not compiled yet, or its model._orig_mod: torch.compile(lorasb.patch(model))"
        )
    if config is not None and fields:
        raise TypeError(f"expected a config or fields, got both: put {', '.join(sorted(fields))} into the config")
    if config is None:
        check_fields(fields)
        config = LoRASBConfig(**fields)
    config = copy.deepcopy(config)  # patching resolves fields (ranks, targets) for this model alone
    if config.task_type is None:  # PEFT chooses its wrapper class (PeftModelForCausalLM, ...) by it
        config.task_type = infer_task_type(model)
    with warnings.catch_warnings():  # PEFT reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = peft.get_peft_model(model, config, adapter_name=adapter_name)
    precision.warn_if_slow(adapted)
    return adapted


def check_fields(fields: Collection[str]) -> None:
    """Raise a TypeError for a name that is no field of `LoRASBConfig`; it names the nearest field."""
    from ..config.adapter import LoRASBConfig

    known = {field.name for field in dataclasses.fields(LoRASBConfig)}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)  # similarity in [0, 1]; 0.6 by default
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(sorted(known))}"
            raise TypeError(f"LoRASBConfig has no field {name!r}: {hint}")
