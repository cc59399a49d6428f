"""Adapters on a basis: A and B are another adapter's own tensors, and only R is separate, in the model and in files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints import shared_factors
from ..checkpoints.adapter_file import Shapes, check_factors, group_by_layer, read_config, read_cores
from ..config.adapter import LoRASBConfig, adapt_exactly
from ..constants import FROZEN_FACTORS, PEFT_PREFIX, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from ..layers.adapter_state import check_name
from ..layers.lookup import (
    adapted_layers,
    digests,
    discard,
    frozen_factors,
    layers_with,
    note_cast,
    parts_of_keys,
    refuse_basis_of_others,
    refuse_uninitialized,
    unsavable,
)
from ..utils.atomic_files import replacing
from .bank import bank_of

CORE = "lorasb_R"
# Settings besides A and B that R's meaning depends on: a file of R alone has to record them, too.
COPIED = ("init", "lora_alpha", "scaling", "wide_factors", "task_type", "target_parameters")


def resolve(model: nn.Module, config: LoRASBConfig, configs: Mapping[str, PeftConfig]) -> None:
    """Write the layers, ranks and scaling of the basis into the config of an adapter on it, or raise a ValueError."""
    if not config.basis or config.from_file:  # a file's config has them; A and B are found by their digest (`loading`)
        return
    _, layers = adapted_layers(model, config.basis)
    ranks = {name: layer.adapters[config.basis].r for name, layer in layers.items()}
    largest = max(ranks.values())
    if config.r not in (None, largest):
        raise ValueError(f"an adapter on {config.basis!r} has its rank, {largest}, got r={config.r}: leave r out")
    refuse_uninitialized(layers, config.basis)
    for field in COPIED if config.basis in configs else ():
        setattr(config, field, copy.deepcopy(getattr(configs[config.basis], field)))
    adapt_exactly(config, ranks)
    config.start_at = config.basis if config.basis_start == "same" else None
    config.basis = next(iter(layers.values())).bases.get(config.basis, config.basis)  # the owner of A and B


def without_factors(tensors: dict[str, Tensor], layers: dict[str, AdaptedLayer], adapter: str) -> dict[str, Tensor]:
    """An adapter's tensors for a file: R, and the digest of A and B if another adapter owns them."""
    if not any(adapter in layer.bases for layer in layers.values()):
        return tensors
    # digest the tensors that were gathered for saving, as the layers' own may be shards
    digest = shared_factors.digest(_factors_in(tensors) or frozen_factors(layers, adapter))
    own = {key: value for key, value in tensors.items() if not shared_factors.is_factor(key)}
    return own | {shared_factors.DIGEST: torch.tensor(list(digest), dtype=torch.uint8)}


def _factors_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = group_by_layer(tensors).items()
    return {f"{name}.{part}": parts[part] for name, parts in layers for part in FROZEN_FACTORS if part in parts}


def with_digest(layers: dict[str, AdaptedLayer], digest: bytes, first: str) -> str | None:
    """The adapter in all these layers whose A and B have this digest; `first` is tried first."""
    bases = {adapter: basis for layer in layers.values() for adapter, basis in layer.bases.items()}
    names = (first, *(name for layer in layers.values() for name in layer.lorasb_R))
    for name in dict.fromkeys(bases.get(name, name) for name in names):  # the owners of A and B
        if not all(name in layer.lorasb_R for layer in layers.values()):
            continue
        factors = frozen_factors(layers, name)
        if any(value.is_meta for value in factors.values()):  # of an adapter that is being loaded
            continue
        if digest in digests(layers, name):
            return name
    return None


def make_room(layers: dict[str, AdaptedLayer], adapter_name: str, tensors: dict[str, Tensor]) -> bool:
    """Prepare an adapter for a file's A and B; True if it left its basis, a ValueError if others share its own."""
    shared = adapter_name in {name for layer in layers.values() for pair in layer.bases.items() for name in pair}
    if not shared and not any(layer.serves_bank(adapter_name) for layer in layers.values()):
        note_cast(layers, adapter_name, _factors_in(tensors))
        return False
    owner = next(layer.bases.get(adapter_name, adapter_name) for layer in layers.values())
    if shared_factors.digest(_factors_in(tensors)) in digests(layers, owner):
        return False
    refuse_basis_of_others(layers, adapter_name)
    leaves = any(adapter_name in layer.bases for layer in layers.values())
    for layer in layers.values():
        layer.leave_basis(adapter_name)
    note_cast(layers, adapter_name, _factors_in(tensors))
    return leaves


def add_adapters(
    model: PeftModel, names: Iterable[str], *, basis: str = "default", basis_start: Literal["zero", "same"] = "zero"
) -> None:
    """Add adapters that share the A and B of another one, as `model.add_adapter` would add each of them.

    All are added, or none. PEFT adds the first one, which goes through the entire model; the others are copies.

    Args:
        model: a PeftModel with an initialized adapter `basis`.
        names: names of the new adapters.
        basis: the adapter whose A and B they share.
        basis_start: R = 0 ("zero"), or a copy of the basis's R ("same").

    Raises:
        ValueError: no such basis, or it is not initialized; or a name that is taken, given twice, or invalid.
    """
    if isinstance(names, str):
        raise ValueError(f"expected several names, got the text {names!r}: add_adapters(model, [{names!r}])")
    names = list(names)
    check_names(model, names)
    if not names:
        return
    first, *others = names
    try:
        model.add_adapter(first, LoRASBConfig(basis=basis, basis_start=basis_start))
        # modules or token rows, which PEFT has to make
        wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        by_peft = any(first in wrapper._adapters for wrapper in wrappers)
        layers = layers_with(model, first).values()
        for name in others:
            if by_peft:
                model.add_adapter(name, LoRASBConfig(basis=basis, basis_start=basis_start))
                continue
            model.peft_config[name] = copy.deepcopy(model.peft_config[first])
            for layer in layers:
                layer.copy_adapter(first, name)  # with a separate R; not active, and so not trained
    except BaseException:  # Ctrl-C, too
        for name in set(names) & set(model.peft_config):
            discard(model.base_model, name)
        raise


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise a ValueError for names that the model's new adapters cannot have."""
    taken: set[str] = set(getattr(model, "peft_config", {}))
    parts = parts_of_keys({path for path, _ in model.named_modules()}) - taken  # `modules_to_save` makes such modules
    bank = bank_of(model.modules())
    for name in names:
        check_name(name)
        if name in parts:
            raise ValueError(unsavable(name))
        if name in taken or (bank is not None and name in bank):
            raise ValueError(
                f"the model or its bank has an adapter {name!r} already, or it is named twice: choose another name"
            )
        taken.add(name)


@torch.no_grad()
def save_adapters(model: PeftModel, folder: Path, names: Sequence[str], *, basis: str = "default") -> None:
    """Write adapters on a basis into `folder`/NAME, the same files as `model.save_pretrained` writes.

    That method goes through the parameters of all adapters for each of them: minutes for some hundred adapters.
    """
    if not names:
        return
    layers = layers_with(model, basis)
    digest = shared_factors.digest(frozen_factors(layers, basis))
    base_name = model.peft_config[basis].base_model_name_or_path
    for name in names:
        config = copy.copy(model.peft_config[name])
        config.base_model_name_or_path = config.base_model_name_or_path or base_name
        save_cores(folder / name, layers, name, config, digest)


@torch.no_grad()
def save_cores(folder: Path, layers: Mapping[str, AdaptedLayer], name: str, config: PeftConfig, digest: bytes) -> None:
    """Write R of an adapter, and the digest of its A and B, into a folder, with its configuration."""
    cores = {f"{PEFT_PREFIX}{layer}.{CORE}": module.lorasb_R[name].float() for layer, module in layers.items()}
    tensors = {key: core.detach().cpu().contiguous() for key, core in cores.items()}
    tensors[shared_factors.DIGEST] = torch.tensor(list(digest), dtype=torch.uint8)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_adapters(model: PeftModel, folder: Path, names: Sequence[str], *, basis: str = "default") -> None:
    """Load R's of adapters on the basis from `folder`, adding missing adapters; a ValueError changes nothing."""
    _, layers = adapted_layers(model, basis)
    for name in names:
        having = [layer for layer in layers.values() if name in layer.lorasb_R]
        if any(layer.lorasb_A[name] is not layer.lorasb_A[basis] for layer in having):
            raise ValueError(f"adapter {name!r} of the model has other A and B than {basis!r}: delete it first")
    known = digests(layers, basis)
    scalings = {layer: module.adapters[basis].made_with for layer, module in layers.items()}
    configs = {name: read_config(folder / name) for name in names}  # all files, before the model changes
    cores = {name: read_cores(folder / name, config, known, scalings) for name, config in configs.items()}
    shapes: dict[str, Shapes] = {layer: {CORE: (m.adapters[basis].r,) * 2} for layer, m in layers.items()}
    for found in cores.values():
        check_factors({layer: {CORE: core} for layer, core in found.items()}, shapes)
    missing = [name for name in names if name not in model.peft_config]
    add_adapters(model, missing, basis=basis)
    for name in missing:  # for the next save: the loaded R's replace any start
        cast(LoRASBConfig, model.peft_config[name]).basis_start = configs[name].get("basis_start", "zero")
    for name, found in cores.items():
        for layer, core in found.items():
            layers[layer].lorasb_R[name].copy_(core)
