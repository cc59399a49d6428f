"""Private names and patches of PEFT."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import Private, find, several

VERIFIED = "PEFT 0.21"
MODEL, LORA = "peft.peft_model.PeftModel", "peft.tuners.lora.LoraModel"
WRAPPER = "peft.utils.other.AuxiliaryTrainingWrapper()"
TUNER, LAYER = "peft.tuners.tuners_utils.BaseTuner", "peft.tuners.tuners_utils.BaseTunerLayer"
HOOKS = (
    *(f"{TUNER}._check_target_module_exists", f"{TUNER}._inject_parameters", f"{TUNER}._create_and_replace"),
    *(f"{TUNER}._replace_module", f"{TUNER}._mark_only_adapters_as_trainable", f"{TUNER}._cast_adapter_dtype"),
    *(f"{TUNER}._unload_and_optionally_merge", f"{TUNER}._get_adapter_state_dict"),
    *(f"{TUNER}._remap_adapter_state_dict_for_load", f"{LAYER}._move_adapter_to_device_of_base_layer"),
)


def _own_features(layer: nn.Module) -> tuple[int | None, int | None]:
    return getattr(layer, "in_features", None), getattr(layer, "out_features", None)


def _refuse_all_linear(config: Any, _: nn.Module) -> None:
    if config.target_modules == "all-linear":
        raise ValueError(f'target_modules="all-linear" needs {VERIFIED}, this is another release: name the modules')


PRIVATE = {
    "in_out_features": Private(
        "peft.tuners.tuners_utils._get_in_out_features",
        "sizes of another quantizer's linear layer",
        "the layer's `in_features` and `out_features`",
        _own_features,
    ),
    "ExcludedModule": Private(
        "peft.tuners.tuners_utils._ExcludedModule",
        "distinguishes modules in `exclude_modules` from others that do not match",
        "`exclude_modules` is ignored for experts of `target_parameters`",
        (),  # for isinstance: no class
    ),
    "include_all_linear": Private(
        "peft.tuners.tuners_utils._maybe_include_all_linear_layers",
        'resolves `target_modules="all-linear"`',
        "`all-linear` is refused: name the modules",
        _refuse_all_linear,
    ),
    "PeftType": Private(
        "peft.utils.peft_types.PeftType._member_map_",
        "`register_peft_method` asks for a member of the enum, which cannot be extended",
        "LORASB is found by value only, or the registration raises",
    ),
    "load_adapter": Private(
        f"{MODEL}.load_adapter",
        "wrapped: finds A and B when resuming, and removes a new adapter that cannot be loaded",
        "resuming raises: A and B are missing",
    ),
    "hotswap_adapter": Private(
        "peft.utils.hotswap.hotswap_adapter", "wrapped: swaps adapters of LoRA-SB", "PEFT's own function refuses them"
    ),
    **several("overridden: patching, saving, loading", "PEFT's own runs, and raises or trains A and B", *HOOKS),
    **several("handles `adapter_names`", "these raise a TypeError", f"{MODEL}._enable_peft_forward_hooks"),
    **several("finds tied modules", "`ensure_weight_tying` raises", f"{LORA}._add_modules_to_save_to_tie"),
    **several("set while gradients are taken", "`lorasb.initialize` raises", f"{LAYER}._disable_adapters"),
    **several(
        "set by a new layer, restored after a failed patch", "layers have no active adapter", f"{LAYER}._active_adapter"
    ),
    **several("detects modules that are trained in full", "`lorasb.add_adapters` raises", f"{WRAPPER}._adapters"),
    **several("set while gradients are taken", "`lorasb.initialize` raises", f"{WRAPPER}._active_adapter"),
}


def extend_peft_types(name: str) -> None:
    """Add a method's name to `PeftType`: `register_peft_method` refuses one that is not a member."""
    kind: Any = importlib.import_module("peft.utils.peft_types").PeftType
    if name in kind.__members__:
        return
    # An enum with members cannot be subclassed or extended, so the member is made as EnumMeta makes one: a str, entered
    # into the tables for iteration, for look-up by name and for look-up by value.
    member: Any = str.__new__(kind, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(kind.__members__)
    member.__objclass__ = kind
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member


@contextmanager
def trained_modules_of(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Have modules that are trained in full, and token rows, use an adapter's copies inside the block if it has any."""
    kind: Any = importlib.import_module("peft.utils.other").AuxiliaryTrainingWrapper
    wrappers: list[Any] = [one for one in model.modules() if isinstance(one, kind) and adapter_name in one._adapters]
    wrappers += [one.token_adapter for one in wrappers if hasattr(one, "token_adapter")]
    before = [one._active_adapter for one in wrappers]
    try:
        for one in wrappers:
            one._active_adapter = [adapter_name]
        yield
    finally:
        for one, active in zip(wrappers, before, strict=True):
            one._active_adapter = active


# at the end: the first of these lines imports PEFT, whose registration calls the functions above
in_out_features: Callable[[nn.Module], tuple[int | None, int | None]] = find(PRIVATE["in_out_features"])
ExcludedModule: type | tuple[()] = find(PRIVATE["ExcludedModule"])
include_all_linear: Callable[[object, nn.Module], object] = find(PRIVATE["include_all_linear"])
