"""`add_adapters`: many adapters on one basis at once, and their R's from files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn

from ..checkpoints import shared_factors
from ..checkpoints.adapter_file import Shapes, check_factors, read_config, read_cores
from ..checkpoints.shared_factors import DIGEST
from ..config.adapter import LoRASBConfig
from ..constants import BASE_ROW, PEFT_PREFIX, WEIGHTS_NAME
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import discard, layers_with
from ..utils.atomic_files import replacing
from .bank import bank_of
from .basis import frozen_factors

CORE = "lorasb_R"


def add_adapters(
    model: PeftModel, names: Iterable[str], *, basis: str = "default", basis_start: Literal["zero", "same"] = "zero"
) -> None:
    """Add adapters that have the A and B of another one, as `model.add_adapter` adds each.

    All are added, or none. The first is added by PEFT, which goes through the whole model, and the others are copies.

    Args:
        model: a PeftModel with the adapter `basis`, initialized.
        names: of the new adapters.
        basis: whose A and B they have.
        basis_start: R = 0, or a copy of the basis's ("same").

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
        # other modules or token rows, which PEFT has to make
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
    """Raise a ValueError for names that the model cannot add adapters of."""
    taken: set[str] = set(getattr(model, "peft_config", {}))
    bank = bank_of(model.modules())
    for name in names:
        # names are entries of a ParameterDict, which cannot be those of its methods
        if not isinstance(name, str) or not name or "." in name or name == BASE_ROW or hasattr(nn.ParameterDict, name):
            raise ValueError(
                f"expected a name without dots for each adapter, not {BASE_ROW} or a method's of a dictionary, got "
                f"{name!r}"
            )
        if name in taken or (bank is not None and name in bank):
            raise ValueError(
                f"the model or its bank has an adapter {name!r} already, or it is named twice: take another"
            )
        taken.add(name)


@torch.no_grad()
def save_adapters(model: PeftModel, folder: Path, names: Sequence[str], *, basis: str = "default") -> None:
    """Write adapters on a basis into `folder`/NAME, the same files as `model.save_pretrained` writes.

    That goes through the parameters of all adapters for each of them, and takes minutes for some hundred.
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
    tensors[DIGEST] = torch.tensor(list(digest), dtype=torch.uint8)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_adapters(model: PeftModel, folder: Path, names: Sequence[str], *, basis: str = "default") -> None:
    """Load R's of adapters on the basis from `folder`, adding missing adapters; a ValueError changes nothing."""
    layers = layers_with(model, basis)
    for name in names:
        having = [layer for layer in layers.values() if name in layer.lorasb_R]
        if any(layer.lorasb_A[name] is not layer.lorasb_A[basis] for layer in having):
            raise ValueError(f"adapter {name!r} of the model has other A and B than {basis!r}: delete it first")
    digest = shared_factors.digest(frozen_factors(layers, basis))
    scalings = {layer: module.adapters[basis].scaling for layer, module in layers.items()}
    configs = {name: read_config(folder / name) for name in names}  # all files, before the model changes
    cores = {name: read_cores(folder / name, config, digest, scalings) for name, config in configs.items()}
    shapes: dict[str, Shapes] = {layer: {CORE: (m.adapters[basis].r,) * 2} for layer, m in layers.items()}
    for found in cores.values():
        check_factors({layer: {CORE: core} for layer, core in found.items()}, shapes)
    missing = [name for name in names if name not in model.peft_config]
    add_adapters(model, missing, basis=basis)
    for name in missing:  # as it is saved again: the R's that are read replace any start
        cast(LoRASBConfig, model.peft_config[name]).basis_start = configs[name].get("basis_start", "zero")
    for name, found in cores.items():
        for layer, core in found.items():
            layers[layer].lorasb_R[name].copy_(core)
