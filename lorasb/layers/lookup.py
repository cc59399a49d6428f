"""Lookup of a model's LoRA-SB layers by adapter name, and rollback of a patch that failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..checkpoints.shared_factors import digest
from ..constants import FACTORS, FROZEN_FACTORS, PEFT_PREFIX
from . import linear_group, unfused_experts
from .adapted_layer import AdaptedLayer
from .weight_adapter import LoRASBWeight

NESTED = "lorasb_nested"  # attribute of a TransformerEncoder that made nested tensors


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers that have the adapter, by their names in the base model (without PEFT's prefix)."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and adapter_name in module.lorasb_R
    }


def layer_kinds(layers: dict[str, AdaptedLayer]) -> dict[str, list[Any]] | None:
    """Return kind, parameter, groups and shape of layers that adapt other weights than a linear's; None without any.

    groups is 0 for a convolution that PEFT's LoRA does not support: dilated, or not padded with zeros.
    """
    found = {}
    for name, layer in layers.items():
        if isinstance(layer, LoRASBWeight):
            one, base = layer.unfolding, layer.get_base_layer()
            plain = getattr(base, "padding_mode", "zeros") == "zeros" and set(getattr(base, "dilation", [1])) == {1}
            found[name] = [one.kind, one.path, getattr(base, "groups", 1) if plain else 0, *one.stored]
    return found or None


def any_merged(model: nn.Module) -> bool:
    return any(module.merged for module in model.modules() if isinstance(module, AdaptedLayer))


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> tuple[str, dict[str, AdaptedLayer]]:
    """Return an adapter's name (by default the active one) and its layers, by their names in the base model."""
    all_layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    if not all_layers:
        raise ValueError("expected a model with LoRA-SB layers: call model = lorasb.patch(model) first")
    active = all_layers[0].active_adapters
    name = adapter_name or (active[0] if active else "")
    layers = layers_with(model, name)
    if not layers:
        adapters = sorted({adapter for layer in all_layers for adapter in layer.lorasb_R})
        raise ValueError(f"no layer has an adapter {name!r}: the model has {', '.join(adapters) or 'none'}")
    return name, layers


def frozen_factors(layers: dict[str, AdaptedLayer], adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's A and B in the model, under their names in a file."""
    return {
        f"{name}.{part}": getattr(layer, part)[adapter_name].detach()
        for name, layer in layers.items()
        for part in FROZEN_FACTORS
    }


def digests(layers: dict[str, AdaptedLayer], adapter_name: str) -> tuple[bytes, ...]:
    """Return the digest of an adapter's A and B, followed by their file's digest if loading cast them."""
    found = digest(frozen_factors(layers, adapter_name))
    cast = next((layer.adapters[adapter_name].cast_from for layer in layers.values()), None)
    return (found, cast[1]) if cast is not None and cast[0] == found else (found,)


def note_cast(layers: dict[str, AdaptedLayer], adapter_name: str, file: dict[str, Tensor]) -> None:
    """Remember the digests of A and B before and after the cast, if the adapter's dtype is not the file's."""
    dtypes = {key: factor.dtype for key, factor in frozen_factors(layers, adapter_name).items()}
    known = {key: value for key, value in file.items() if key in dtypes}
    if any(value.dtype != dtypes[key] for key, value in known.items()):
        found = digest({key: value.to(dtypes[key]) for key, value in known.items()}), digest(known)
        for layer in layers.values():
            layer.adapters[adapter_name].cast_from = found


def refuse_uninitialized(layers: dict[str, AdaptedLayer], adapter_name: str) -> None:
    """Raise a ValueError for an adapter that has not been initialized."""
    fresh = next((name for name, layer in layers.items() if not layer.is_initialized(adapter_name)), None)
    if fresh is not None:
        raise ValueError(
            f"adapter {adapter_name!r} has not been initialized ({fresh}): call "
            f"lorasb.initialize(model, dataloader, adapter_name={adapter_name!r}, lr=...) first"
        )


def layers_of_one(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, AdaptedLayer]]:
    """Return an initialized adapter's name, by default the only active one's, and its layers, with all of R."""
    name, layers = adapted_layers(model, adapter_name)
    cores = [layer.lorasb_R[name] for layer in layers.values()]
    if any(hasattr(core, "device_mesh") or core.numel() == 0 for core in cores):
        raise ValueError(
            "expected all of R on every process, got shards of it (FSDP2 or ZeRO-3): save the adapter and load it into "
            "one process, or train with DDP"
        )
    refuse_uninitialized(layers, name)
    active = next(iter(layers.values())).active_adapters
    if adapter_name is None and len(active) > 1:
        which = f"adapters {', '.join(active)} are active"
        raise ValueError(f"{which}: name one by adapter_name=, or sum them by add_weighted_adapter")
    return name, layers


def refuse_more_than_factors(model: Any, adapter_name: str, remedy: str) -> None:
    """Raise a ValueError for an adapter that trains more than R: modules, token rows or biases."""
    wrappers = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    with_modules = any(adapter_name in wrapper._adapters for wrapper in wrappers)
    if with_modules or model.peft_config[adapter_name].bias != "none":
        what = "trained modules or token rows" if with_modules else "trained biases"
        raise ValueError(f"adapter {adapter_name!r} has more than R ({what}): {remedy}")


def parts_of_keys(paths: Iterable[str]) -> set[str]:
    """Return the dot-separated parts that come before the adapter name in state dict keys of layers at these paths."""
    parts = {part for path in (PEFT_PREFIX, *paths) for part in path.split(".")}
    return (parts | {"base_layer", *FACTORS}) - {""}


def unsavable(adapter_name: str) -> str:
    """Return the message for an adapter name that occurs in layers' keys, so that PEFT does not save these."""
    return (
        f"adapter {adapter_name!r} has the name of a part of the model, as in model.layers.0, and PEFT would leave "
        f"that part's layers out of other adapters' files: take another name, such as 'u{adapter_name}'"
    )


def refuse_shared_basis(layers: dict[str, AdaptedLayer], adapter_name: str) -> None:
    """Raise a ValueError if new A and B would replace those of other adapters, too."""
    for layer in layers.values():
        if adapter_name in layer.bases:
            raise ValueError(
                f"adapter {adapter_name!r} has the A and B of {layer.bases[adapter_name]!r}, which new ones would "
                "replace there, too: make an adapter with separate factors, without basis=..."
            )
    refuse_basis_of_others(layers, adapter_name)


def refuse_basis_of_others(layers: dict[str, AdaptedLayer], adapter_name: str) -> None:
    """Raise a ValueError for an adapter whose A and B others use."""
    others = sorted({name for layer in layers.values() for name, basis in layer.bases.items() if basis == adapter_name})
    if any(layer.serves_bank(adapter_name) for layer in layers.values()):
        others.insert(0, "the model's bank (bank.detach())")
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(
            f"adapter {adapter_name!r} is the basis of {shown}, whose R would mean nothing without its A and B: "
            "delete those first"
        )


def allow_nested(model: nn.Module, allowed: bool) -> None:
    """Allow or forbid a TransformerEncoder's nested tensors of padded rows, which adapted layers do not take."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        if allowed and vars(module).pop(NESTED, False):
            module.use_nested_tensor = True
        elif not allowed and module.use_nested_tensor and any(isinstance(m, AdaptedLayer) for m in module.modules()):
            module.use_nested_tensor = False
            setattr(module, NESTED, True)


def discard(model: Any, adapter_name: str) -> None:
    """Remove an adapter; if it is the model's only one, put the original modules back in place of the wrappers."""
    adapter_names = {name for layer in model.modules() if isinstance(layer, AdaptedLayer) for name in layer.lorasb_R}
    if adapter_names != {adapter_name}:
        model.peft_config.pop(adapter_name, None)
        for module in model.modules():
            if isinstance(module, AdaptedLayer) and adapter_name in module.lorasb_R:
                module.delete_adapter(adapter_name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=None)
        return
    # The only adapter: the model becomes what it was before `lorasb.patch`.
    for module in model.modules():
        if not isinstance(module, BaseTuner) and set(vars(module).get("peft_config", ())) == {adapter_name}:
            del module.peft_config  # PEFT sets it on the base model, too, and would warn at the next load
    linear_group.detach(model)
    allow_nested(model, True)
    for parent in list(model.modules()):  # lists: children are replaced while iterating
        for name, child in list(parent.named_children()):
            if isinstance(child, AdaptedLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    unfused_experts.close(model)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore modules, requires_grad flags and the layers' adapters if the block raises."""
    # References suffice: injection replaces modules and sets flags, but copies no weights.
    children = [(parent, dict(parent._modules)) for parent in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapters = [(m, set(m.lorasb_R), m._active_adapter) for m in model.modules() if isinstance(m, AdaptedLayer)]
    try:
        yield
    except BaseException:  # Ctrl-C in the middle of a patch, too
        for parent, modules in children:
            # clear() drops children that the block added, which update() alone would leave in place
            parent._modules.clear()
            parent._modules.update(modules)
        for layer, names, active in adapters:
            layer._active_adapter = active  # first: PEFT warns if it deletes an active adapter
            for name in set(layer.lorasb_R) - names:
                layer.delete_adapter(name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
