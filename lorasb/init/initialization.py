"""`lorasb.initialize`: from a patched model and some batches to A, R and B in place."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any, cast

import torch
from torch import nn

from ..layers.lookup import adapted_layers, any_merged
from ..tuner.config import LoRASBConfig
from ..utils.byte_sizes import parse_size
from ..utils.precision import warn_if_slow
from .factors.factorize import Recipe
from .factors.transaction import Staging
from .gradients.loss import LossFn
from .gradients.task import Layers
from .pipeline import Options, Outcome, from_gradients, from_weights
from .report.init_report import InitReport
from .report.provenance import provenance
from .report.skipped_modules import left_alone

UPDATES = ("adamw", "sgd")
STRATEGIES = ("auto", "layerwise", "accumulate")
LONGEST_START = 4.0  # in AdamW's steps of R; measured, docs/choosing.md


def initialize(
    model: nn.Module,
    batches: Any = None,
    *,
    lr: float | None = None,
    num_samples: int | None = None,
    update: str = "adamw",
    longest_start: float | None = LONGEST_START,
    strategy: str = "auto",
    blocks: str | None = None,
    memory_budget: float | str | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    stability: bool = False,
    adapter_name: str | None = None,
    progress: bool = True,
) -> InitReport:
    """Fill A, R and B from the first step that full fine-tuning would take (paper, Eq. 6-8).

    With G = Σ_i ∇W L(x_i) over samples and ΔW = −η·sign(G) = U Σ Vᵀ: B = U_r, A = V_rᵀ, R = Σ_r / s. L(x_i) is the
    mean over sample i's own labeled tokens, so the result does not depend on how samples are batched. No base weight
    ever requires a gradient; sums are fp32. Under torch.distributed every process passes the batches of its own share.

    ΔW [out, in] moves every weight by η, R [r, r] has r² entries: where η is R's rate, ‖Σ_r‖ is the length of many
    steps of R, which training would first have to take back. So η is shortened, layer by layer, until
    ‖Σ_r‖ ≤ longest_start·η·r, the length of so many of AdamW's steps of R. A, B and R's direction stay as they are.

    Args:
        model: a patched model.
        batches: a DataLoader (samples are drawn from its data set by `seed`), a list of dicts of tensors (drawn
            likewise), or any iterable of dicts (taken in order). Not needed for the data-free inits of the config, nor
            where `cache` is there.
        lr: η of the simulated step, the rate of R's first one; `lorasb.first_step_lr` gives the one of a schedule.
        num_samples: how many, over all processes; None takes min(available, max(32, n/1000)), or all of an iterable
            without a size.
        update: "adamw" (signs) or "sgd" (ΔW = −η·G/n, the mean gradient itself, Theorem 6).
        longest_start: the start's length at most, in AdamW's steps of R at the rate `lr`; 0 for R = 0, None for the
            whole step, as the paper has it. SGD's step is as long as R's own and stays whole.
        strategy: "layerwise" computes one block at a time, from the last to the first; "accumulate" passes through the
            whole model, as often as `memory_budget` asks for; "auto" takes the first where the model is a stack of
            blocks. The sums are the same.
        blocks: name of the list of blocks ("model.layers"), where the one found is not the right one.
        memory_budget: bytes on top of the model (or "6GB"); None allows what a training step of 32 samples needs.
        loss_fn: `loss_fn(model, batch)`, where the model's own `.loss` will not do. It counts times the batch's rows.
        seed: of the samples drawn and of the SVD. The global random state does not move.
        cache: a file for the signs of all layers. If it is there, no backward is needed, at any rank; if a run is cut
            off, the next goes on from the blocks that were finished.
        stability: also measure how much the subspaces of two halves of the samples overlap; takes twice the memory
            for sums and three times the factoring.
        adapter_name: which adapter; the active one unless given.
        progress: show an estimate and a progress bar (on rank 0).

    Returns:
        An `InitReport`: what each layer keeps, singular values, times.

    Raises:
        ValueError: bad arguments, no samples, no loss, a gradient that is zero or not finite, too little memory, a
            cache of something else: the model stays as it is.
    """
    started = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    name, layers = _unmerged_layers(model, adapter_name)
    config: LoRASBConfig = cast(Any, model).peft_config[name]
    _check(update, strategy, cache, longest_start)
    warn_if_slow(model)
    if config.init == "update":
        if lr is None or not 0 < lr < float("inf") or (batches is None and not _exists(cache)):
            raise ValueError("init='update' takes batches and lr > 0: initialize(model, loader, lr=...)")
        limit = longest_start if update == "adamw" else None  # SGD's step is R's own (Theorem 6)
        budget, recipe = parse_size(memory_budget), Recipe(name, lr, update, seed, limit)
        options = Options(recipe, num_samples, strategy, blocks, budget, loss_fn, cache, stability, progress)
        # hooks that end a pass half-way would have a compiled model compiled anew at every block
        with Staging(name) as staging, torch.compiler.set_stance("force_eager"):
            outcome = from_gradients(model, layers, batches, options, staging)
        report = _recorded(
            model, config, outcome, update=update, lr=lr, seed=seed, started=started, longest_start=limit
        )
    else:
        report = without_data(model, config, name, layers, seed, progress)
    _warn_if_frozen(layers, name)
    return report


def without_data(
    model: nn.Module, config: LoRASBConfig, name: str, layers: Layers, seed: int = 0, progress: bool = True
) -> InitReport:
    """The data-free inits, which patching does by itself: A, R and B of the adapter `name` by `seed`.

    Raises:
        ValueError: a weight has NaN or Inf entries; the layers stay as they are.
    """
    started = time.perf_counter()
    outcome = from_weights(layers, config.init, name, seed, progress)
    return _recorded(model, config, outcome, update="none", lr=None, seed=seed, started=started, longest_start=None)


def _recorded(
    model: nn.Module,
    config: LoRASBConfig,
    outcome: Outcome,
    *,
    update: str,
    lr: float | None,
    seed: int,
    started: float,
    longest_start: float | None,
) -> InitReport:
    """The report; most of it is kept in the config, and so in the adapter's file."""
    report = InitReport(
        init=config.init,
        update=update,
        lr=lr,
        num_samples=outcome.num_samples,
        seed=seed,
        loss=outcome.loss,
        seconds=time.perf_counter() - started,
        layers=outcome.layers,
        strategy=outcome.strategy,
        why=outcome.why,
        left=left_alone(model),
        longest_start=longest_start,
    )
    config.init_provenance = provenance(report, outcome.data_hash)
    return report


def _warn_if_frozen(layers: Layers, name: str) -> None:
    active = any(name in layer.active_adapters for layer in layers.values())
    if active and not any(layer.lorasb_R[name].requires_grad for layer in layers.values()):
        warnings.warn(
            f"adapter {name!r} is initialized, and nothing of it will train, as no R requires a gradient: "
            f"model.set_adapter({name!r})",
            stacklevel=3,
        )


def _check(update: str, strategy: str, cache: Any, longest_start: float | None) -> None:
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if update == "sgd" and cache is not None:
        raise ValueError("update='sgd' needs the gradient itself, and a cache keeps its signs only: leave cache out")
    if longest_start is not None and not longest_start >= 0:
        raise ValueError(f"longest_start is a number of steps of R >= 0, or None for no limit, got {longest_start!r}")


def _exists(cache: str | os.PathLike[str] | None) -> bool:
    return cache is not None and os.path.exists(cache)


def _unmerged_layers(model: nn.Module, adapter_name: str | None) -> tuple[str, Layers]:
    name, layers = adapted_layers(model, adapter_name)
    if any_merged(model):
        raise ValueError("expected unmerged weights, as gradients are taken at the base: call model.unmerge_adapter()")
    return name, layers
