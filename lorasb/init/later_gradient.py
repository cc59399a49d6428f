"""`lorasb.refresh`: what was held back of the rank, filled from the gradient where training has come to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..distributed.process_group import sharded
from ..layers.linear import LoRASBLinear
from ..layers.lookup import adapted_layers, refuse_shared_basis, uninitialized
from .factors.methods import Factors
from .factors.transaction import Staging
from .gradients.task import Layers
from .held_back import filled, held
from .initialization import initialize
from .report.init_report import InitReport


def refresh(model: nn.Module, batches: Any, *, adapter_name: str | None = None, **options: Any) -> InitReport:
    """Fill what `initialize(..., held_back=)` left empty of A and B, from the gradient at the weights reached.

    With G = Σ_i ∇W L(x_i) at W = W0 + s·B R A, the new columns of B and rows of A lead what the first step -η·sign(G)
    has outside of those that are there. R's entries for them are zero, so that the model computes what it did; R, its
    optimizer's moments and the schedule stay as they are. `InitCallback(refresh_at=)` does it inside of a Trainer.

    Args:
        model: a patched model in training.
        batches: as of `lorasb.initialize`: better others than the first ones.
        adapter_name: name of the adapter, which has to be active; the active one if None.
        options: `num_samples`, `update`, `strategy`, `blocks`, `memory_budget`, `loss_fn`, `stability`, `seed` and
            `progress` of `lorasb.initialize`.

    Returns:
        What the new factors would capture alone.

    Raises:
        ValueError: nothing is held back, an inactive adapter, a sharded model, or what `initialize` refuses; the model
            is unchanged.
    """
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile's OptimizedModule
    name, layers = adapted_layers(model, adapter_name)
    check_refreshable(model, name, layers)
    if isinstance(batches, Mapping):
        raise ValueError("several tasks share a basis, which nothing refreshes: pass one loader, or a list of batches")
    if options.get("cache") is not None:
        raise ValueError("a cache keeps the signs of the base's gradient, and this one is another: leave cache out")
    active = next(iter(layers.values())).active_adapters
    waiting = {path: layer for path, layer in layers.items() if held(layer, name)}
    config = cast(Any, model).peft_config[name]
    with _beside(model, name, layers) as later, Staging(name) as staging:
        report = initialize(model, batches, lr=1.0, longest_start=None, adapter_name=later, beside=active, **options)
        for layer in waiting.values():
            b, a = filled(layer, name, later)
            staging.write(layer, Factors(b, layer.lorasb_R[name].detach().clone(), a, torch.zeros(0)))
        if config.init_provenance is not None:
            config.init_provenance["later"] = dict(cast(Any, model).peft_config[later].init_provenance)
    return report


def check_refreshable(model: Any, name: str, layers: Layers) -> None:
    """Raise a ValueError for an adapter or a model that cannot be refreshed."""
    if sharded(model):
        raise ValueError(
            "a sharded model (FSDP, ZeRO-3) cannot be refreshed: train it with all of the rank from the start"
        )
    refuse_shared_basis(layers, name)
    fresh = uninitialized(layers, name)
    if fresh:
        raise ValueError(
            f"adapter {name!r} has not been initialized ({fresh[0]}): lorasb.initialize(..., held_back=0.5)"
        )
    first = next(iter(layers.values()))
    if name not in first.active_adapters:
        raise ValueError(
            f"adapter {name!r} is not active, so that the model does not compute it: model.set_adapter({name!r})"
        )
    if not any(held(layer, name) for layer in layers.values()):
        raise ValueError(
            f"nothing of adapter {name!r} is held back: lorasb.initialize(model, dataloader, held_back=0.5, ...) "
            "leaves half of the rank empty, to be filled once"
        )


@contextmanager
def _beside(model: Any, name: str, layers: Layers) -> Iterator[str]:
    """An inactive adapter like `name`, to be initialized by gradients, for as long as the block lasts."""
    later = f"{name}_later"
    while later in model.peft_config:
        later += "_"
    every = [module for module in model.modules() if isinstance(module, LoRASBLinear)]
    flags = [(core, core.requires_grad) for layer in every for core in layer.lorasb_R.values()]
    config = copy.deepcopy(model.peft_config[name])
    config.init = "update"
    model.peft_config[later] = config
    try:
        for layer in layers.values():
            if later not in layer.lorasb_R:  # attention adds an adapter to the layer inside of it, too
                layer.add_adapter(later, layer.r[name], wide_factors=layer.wide_factors[name])
        yield later
    finally:
        model.peft_config.pop(later, None)
        for layer in every:
            if later in layer.lorasb_R:
                layer.delete_adapter(later)
        for core, flag in flags:
            core.requires_grad_(flag)
