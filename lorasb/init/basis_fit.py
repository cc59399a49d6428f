"""`lorasb.basis_fit`: what a basis keeps of the first step of a task, before an adapter is trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import layers_with, uninitialized
from ..serving.joint_basis import kept_energies, share_of
from .initialization import initialize
from .sampling import Loader
from .several_tasks import config_like


@dataclass(frozen=True)
class BasisFit:
    """Share of a task's first step that a basis keeps, ‖Bᵀ Δ Aᵀ‖² / ‖Δ‖².

    Δ [out, in] is the first step of an adapter of the same rank with a separate A and B, whose share is 1.

    Attributes:
        share: of all layers together.
        random: what a random basis of this rank keeps in the mean, r² / (out·in), weighted as `share` is.
        by_layer: the share of each layer; 1 where no sample reaches it.
        loss: mean loss of the samples at the base model.
    """

    share: float
    random: float
    loss: float | None = None
    by_layer: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def basis_fit(
    model: PeftModel,
    batches: Loader,
    *,
    basis: str = "default",
    num_samples: int | None = None,
    update: str = "adamw",
    seed: int = 0,
    progress: bool = True,
) -> BasisFit:
    """Measure how much of a task's first step a basis keeps, by one initialization of a temporary adapter.

    Args:
        model: a PeftModel with the adapter `basis`, initialized; it is left unchanged.
        batches: of the task; see `lorasb.initialize` for these and for num_samples, update, seed and progress.
        basis: name of the adapter whose A and B are the basis.

    Raises:
        ValueError: no such basis, or it is not initialized; or what `initialize` refuses.
    """
    layers = layers_with(model, basis)
    if not layers or uninitialized(layers, basis):
        raise ValueError(f"expected basis= to name an initialized adapter of the model, got {basis!r}")
    full_step = partial(initialize, model, batches, lr=1.0, longest_start=None)
    with _temporary_adapter(model, basis, layers) as own:
        report = full_step(num_samples=num_samples, update=update, seed=seed, adapter_name=own, progress=progress)
        energies = kept_energies(layers, own, basis)
    by_chance = []  # what a random basis keeps of each layer's step, and all of it
    for name, (_, whole) in energies.items():
        layer = layers[name]
        by_chance.append((whole * (layer.adapters[basis].r ** 2 / (layer.out_features * layer.in_features)), whole))
    by_layer = {name: share_of([pair]) for name, pair in energies.items()}
    return BasisFit(share_of(energies.values()), share_of(by_chance), report.loss, by_layer)


@contextmanager
def _temporary_adapter(model: Any, basis: str, layers: dict[str, AdaptedLayer]) -> Iterator[str]:
    """An inactive adapter on the layers and at the ranks of the basis, for the length of the block."""
    name = f"{basis}_fit"
    while name in model.peft_config:
        name += "_"
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    flags = [(core, core.requires_grad) for layer in adapted for core in layer.lorasb_R.values()]
    active = list(model.active_adapters)
    try:
        like = config_like(model.peft_config[basis], layers)
        like.init = "update"  # whatever the basis was made from
        model.add_adapter(name, like)
        yield name
    finally:
        model.base_model.set_adapter(active)
        if name in model.peft_config:
            model.delete_adapter(name)
        for core, flag in flags:
            core.requires_grad_(flag)
