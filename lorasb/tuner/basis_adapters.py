"""`add_adapters`: many adapters on one basis at once, and their R's from files."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoints import shared_factors
from ..layers.linear import LoRASBLinear
from ..layers.lookup import layers_with
from .bank_files import cores_of
from .basis import frozen_factors
from .config import LoRASBConfig
from .rollback import discard


def add_adapters(
    model: Any, names: Iterable[str], *, basis: str = "default", basis_start: Literal["zero", "same"] = "zero"
) -> None:
    """Add adapters that have the A and B of another one, as `model.add_adapter` adds each.

    That looks through the whole model for every adapter, and takes longer the more there are; here it is done for the
    first, and the others are copies of it: all of them, or none.

    Args:
        model: a PeftModel with the adapter `basis`, initialized.
        names: of the new adapters.
        basis: whose A and B they have.
        basis_start: R = 0, or a copy of the basis's ("same").

    Raises:
        ValueError: no such basis, or it is not initialized; a name that is taken, given twice, or cannot be one.
    """
    names = list(names)
    _check(model, names)
    try:
        for name in names[:1]:
            model.add_adapter(name, LoRASBConfig(basis=basis, basis_start=basis_start))
        by_peft = bool(names) and _has_more_than_cores(model, names[0])
        layers = list(layers_with(model, names[0]).values()) if names else []
        for name in names[1:]:
            if by_peft:
                model.add_adapter(name, LoRASBConfig(basis=basis, basis_start=basis_start))
            else:
                _copy(model, layers, names[0], name)
    except BaseException:  # Ctrl-C, too
        for name in set(names) & set(model.peft_config):
            discard(model.base_model, name)
        raise


def _check(model: Any, names: Sequence[str]) -> None:
    taken: set[str] = set(getattr(model, "peft_config", {}))
    for name in names:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"expected a name without dots for each adapter, got {name!r}")
        if name in taken:
            raise ValueError(f"the model has an adapter {name!r} already, or it is named twice: choose another name")
        taken.add(name)


def _has_more_than_cores(model: nn.Module, name: str) -> bool:
    """True if the adapter has modules or token rows of its own: PEFT makes those."""
    wrappers = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return any(name in wrapper._adapters for wrapper in wrappers)


def _copy(model: Any, layers: Sequence[LoRASBLinear], like: str, name: str) -> None:
    """An adapter like another one, with an R of its own; not active, and so not trained."""
    model.peft_config[name] = copy.deepcopy(model.peft_config[like])
    for layer in layers:
        layer.copy_adapter(like, name)


@torch.no_grad()
def load_adapters(model: Any, folder: Path, names: Sequence[str], *, basis: str = "default") -> None:
    """Load the R's of adapters on the basis from their folders in `folder`; those that the model lacks are added.

    Raises:
        ValueError: a file is truncated, has more than R, or belongs to other A and B.
    """
    layers = layers_with(model, basis)
    digest = shared_factors.digest(frozen_factors(layers, basis))
    scalings = {layer: module.scaling[basis] for layer, module in layers.items()}
    cores = {name: cores_of(folder / name, digest, scalings) for name in names}  # all, before the model changes
    add_adapters(model, [name for name in names if name not in model.peft_config], basis=basis)
    for name, found in cores.items():
        for layer, core in found.items():
            layers[layer].lorasb_R[name].copy_(core)
