"""`lorasb.refresh`: what was held back of the rank, filled from the gradient where training has come to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..compat.torch import uncompiled
from ..distributed.process_group import sharded
from ..layers.adapted_layer import AdaptedLayer
from ..layers.lookup import adapted_layers, layers_with, refuse_shared_basis, uninitialized
from .factorize import Factors, filled, held
from .init_report import InitReport
from .initialization import initialize
from .task import InitOptions, Layers
from .write import Staging

OPTIONS = ("num_samples", "update", "strategy", "blocks", "memory_budget", "loss_fn", "progress")


def refresh(
    model: nn.Module,
    batches: Any,
    *,
    optimizer: Any = None,
    seed: int = 1,
    adapter_name: str | None = None,
    **options: Any,
) -> InitReport:
    """Fill what `initialize(..., held_back=)` left empty of A and B, from the gradient at the weights reached.

    With G = Σ_i ∇W L(x_i) at W = W0 + s·B R A, the new columns of B and rows of A lead what the first step -η·sign(G)
    has outside of those that are there. R's entries for them are zero, so that the model computes what it did; R, its
    moments and the schedule stay as they are. `InitCallback(refresh_at=)` does it inside of a Trainer.

    Args:
        model: a patched model in training.
        batches: as of `lorasb.initialize`.
        optimizer: of R. AdamW's second moments of R's new entries, which are zero, become the mean of the others: with
            zeros their first steps would be several times the rate.
        seed: of the draw and of the SVD. Another one than at the start draws other samples.
        adapter_name: name of the adapter, which has to be active; the active one if None.
        options: `num_samples`, `update`, `strategy`, `blocks`, `memory_budget`, `loss_fn` and `progress` of
            `lorasb.initialize`.

    Returns:
        What new factors of all of r would capture alone.

    Raises:
        ValueError: nothing is held back, an adapter that is not active or not initialized, a sharded model, or what
            `initialize` refuses; the model is unchanged.
        TypeError: an option that is not one of these.
    """
    model = uncompiled(model)
    name, layers = adapted_layers(model, adapter_name)
    check_refreshable(model, name, layers)
    _check_options(batches, options)
    waiting = {layer: count for layer in layers.values() if (count := held(layer, name))}
    with _helper_adapter(model, name, layers) as later, Staging(InitOptions(adapter=name)) as staging:
        given = options | {"adapter_name": later, "beside": _active(layers), "seed": seed}
        report = initialize(model, batches, lr=1.0, longest_start=None, **given)
        for layer in waiting:
            b, a = filled(layer, name, later)
            staging.write(layer, Factors(b, layer.lorasb_R[name].detach(), a, torch.zeros(0)))
        _record(model, name, later)
    if optimizer is not None:
        for layer, count in waiting.items():
            settle_moments(optimizer, layer.lorasb_R[name], count)
    return report


def _check_options(batches: Any, options: dict[str, Any]) -> None:
    if isinstance(batches, Mapping):
        raise ValueError("several tasks share a basis, which nothing refreshes: pass one loader, or a list of batches")
    others = [name for name in options if name not in OPTIONS]
    if others:
        raise TypeError(f"refresh takes {', '.join(OPTIONS)} of initialize's options, got {others[0]!r}")


def settle_moments(optimizer: Any, core: nn.Parameter, count: int) -> None:
    """Give R's last `count` rows and columns the mean second moment of the other entries, where AdamW keeps one."""
    moments = optimizer.state.get(core, {}).get("exp_avg_sq")
    if moments is not None and moments.shape == core.shape:
        kept = len(core) - count
        mean = moments[:kept, :kept].mean()
        moments[kept:] = mean
        moments[:, kept:] = mean


def _record(model: Any, name: str, later: str) -> None:
    """Add a refresh, which has no rate and no start, to an adapter's provenance."""
    provenance, found = (model.peft_config[one].init_provenance for one in (name, later))
    if provenance is not None:
        provenance["later"] = {key: value for key, value in found.items() if key not in ("lr", "longest_start")}


def _active(layers: Layers) -> list[str]:
    return list(next(iter(layers.values())).active_adapters)


def check_refreshable(model: Any, name: str, layers: Layers) -> None:
    """Raise a ValueError for an adapter or a model that cannot be refreshed."""
    if sharded(model):
        raise ValueError(
            "a sharded model (FSDP, ZeRO-3) cannot be refreshed: train it with all of the rank from the start"
        )
    refuse_shared_basis(layers, name)
    for one in (name, *_active(layers)):
        fresh = uninitialized(layers_with(model, one), one)
        if fresh:
            raise ValueError(f"adapter {one!r} has not been initialized ({fresh[0]}): call lorasb.initialize first")
    if name not in _active(layers):
        raise ValueError(
            f"adapter {name!r} is not active, so that the model does not compute it: model.set_adapter({name!r})"
        )
    if not any(held(layer, name) for layer in layers.values()):
        raise ValueError(
            f"nothing of adapter {name!r} is held back: lorasb.initialize(model, dataloader, held_back=0.5, ...) "
            "leaves half of a rank above 1 empty, to be filled once"
        )


@contextmanager
def _helper_adapter(model: Any, name: str, layers: Layers) -> Iterator[str]:
    """An inactive adapter like `name`, to be initialized by gradients, for as long as the block lasts."""
    later = f"{name}_later"
    while later in model.peft_config:
        later += "_"
    every = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    flags = [(core, core.requires_grad) for layer in every for core in layer.lorasb_R.values()]
    config = copy.deepcopy(model.peft_config[name])
    config.init = "update"
    try:
        model.peft_config[later] = config
        for layer in layers.values():
            if later not in layer.lorasb_R:  # attention adds an adapter to the layer inside of it, too
                layer.add_adapter(later, layer.adapters[name].r, wide_factors=layer.adapters[name].wide_factors)
        yield later
    finally:
        model.peft_config.pop(later, None)
        for layer in every:
            layer.delete_adapter(later)  # or what is there of it
        for core, flag in flags:
            core.requires_grad_(flag)
