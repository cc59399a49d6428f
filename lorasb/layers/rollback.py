"""Restores modules, requires_grad flags and adapters of a model when patching or loading fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from . import linear_group, unfused_experts
from .linear import LoRASBLinear


def discard(model: Any, adapter_name: str) -> None:
    """Remove an adapter; if it is the model's only one, put the original modules back in place of the wrappers."""
    adapter_names = {name for layer in model.modules() if isinstance(layer, LoRASBLinear) for name in layer.lorasb_R}
    if adapter_names != {adapter_name}:
        model.peft_config.pop(adapter_name, None)
        for module in model.modules():
            if isinstance(module, LoRASBLinear) and adapter_name in module.lorasb_R:
                module.delete_adapter(adapter_name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=None)
        return
    # The only adapter: the model becomes what it was before `lorasb.patch`.
    linear_group.dissolve(model)
    for parent in list(model.modules()):  # lists: children are replaced while iterating
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRASBLinear):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    unfused_experts.close(model)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore modules, requires_grad flags and the layers' adapters if the block raises."""
    # Only references are kept: injection replaces modules and sets flags, and copies no weights.
    children = [(parent, dict(parent._modules)) for parent in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapters = [(m, set(m.lorasb_R), m._active_adapter) for m in model.modules() if isinstance(m, LoRASBLinear)]
    try:
        yield
    except BaseException:  # Ctrl-C in the middle of a patch, too
        for parent, modules in children:
            # clear() drops children that the block added, which update() alone would leave in place
            parent._modules.clear()
            parent._modules.update(modules)
        for layer, names, active in adapters:
            for name in set(layer.lorasb_R) - names:
                layer.delete_adapter(name)
            layer._active_adapter = active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


Place = tuple[nn.Module, str]  # an owner, and the child's name in it


def places_of_shared(model: nn.Module) -> dict[nn.Module, list[Place]]:
    """The places of every module that has more than one; one pass, as models of experts have thousands of targets."""
    places: dict[nn.Module, list[Place]] = {}
    for owner in model.modules():
        for name, child in owner._modules.items():
            if child is not None:
                places.setdefault(child, []).append((owner, name))
    return {child: found for child, found in places.items() if len(found) > 1}


@contextmanager
def places_known(tuner: Any) -> Iterator[None]:
    """Give a tuner the places of its model's shared modules, as `shared`, while PEFT replaces modules one by one."""
    tuner.shared = places_of_shared(tuner.model)
    try:
        yield
    finally:
        tuner.shared = {}
