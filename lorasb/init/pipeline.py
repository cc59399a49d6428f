"""One initialization from samples to factors: selects samples, plans, sums gradients, factors, caches and reports.

`initialization` is the public function above; `gradients` and `factors` do the work below.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..distributed.process_group import Processes, sharded
from ..layers.base_weight import weight_present
from ..layers.linear import LoRASBLinear
from .cache import Cache, CachedGradient
from .executor import Executor
from .factorize import Factors, Recipe, kaiming, lora_xs, random_subspace
from .init_report import LayerReport
from .loss import LossFn, labeled_rows, unlabeled
from .plan import InitPlan, make_plan
from .provenance import cache_key
from .sampling import Batch, batch_size, collect, select, take_rows
from .svd import full_precision
from .task import Layers, Piece, Work, frozen_base, stored_16bit
from .write import LayerWriter, Staging

PROGRESS_DELAY = 2.0  # seconds before a progress bar appears


@dataclass(frozen=True)
class InitOptions:
    """Arguments of `initialize` other than the model and the batches."""

    recipe: Recipe
    num_samples: int | None = None
    strategy: str = "auto"
    blocks: str | None = None
    memory_budget: float | None = None
    loss_fn: LossFn | None = None
    cache: str | os.PathLike[str] | None = None
    stability: bool = False
    progress: bool = True
    beside: tuple[str, ...] = ()


@dataclass
class Outcome:
    """Results of an initialization: what its report and the adapter's provenance are made from."""

    layers: list[LayerReport] = field(default_factory=list)
    num_samples: int = 0
    data_hash: str | None = None
    loss: float | None = None
    strategy: str = "none"
    why: str = ""


def from_gradients(model: nn.Module, layers: Layers, batches: Any, options: InitOptions, staging: Staging) -> Outcome:
    """Write factors from the gradients of the samples, or from a cache of their signs.

    A collective: every rank calls it with the batches of its share.
    """
    processes = Processes()
    pieces, seen, data_hash = _samples(model, batches, options, processes)
    recipe = _mean_recipe(options, pieces, processes) if options.recipe.update == "sgd" else options.recipe
    writer = LayerWriter(layers, recipe, processes, staging, options.stability)
    if options.cache is not None:
        # Before any forward: a cache of other data or weights is refused at once.
        first, seed = next(iter(layers.values())), options.recipe.seed
        key = cache_key(model, first, options.recipe.update, seed, seen, data_hash, options.loss_fn)
        writer.cache = Cache(options.cache, key, batches is not None)
        cached = writer.cache.load(list(layers))
        if cached is not None and options.stability:
            raise ValueError("stability compares halves of the samples, and a cache keeps their sum: leave cache out")
        if cached is not None:
            return _from_cache(model, writer, writer.cache, cached)
    work = Work(model, layers, pieces, options.loss_fn, processes, options.stability, options.recipe.update == "sgd")
    if recipe.update == "per-sample":
        ranks = [layer.adapters[recipe.adapter].r for layer in layers.values()]
        work.sketches, work.sketch_rank = writer.sketch, max(ranks)
    with frozen_base(model, options.beside):
        executor = _execute_plan(work, writer, options)
        writer.write_fallbacks(model, [name for name in layers if name not in writer.reports])
    # fp64, as counts of samples and sums of losses are reduced in one tensor.
    loss, labeled = processes.all_reduce_sum(torch.tensor([work.loss, work.labeled], dtype=torch.float64)).tolist()
    loss /= labeled
    outcome = Outcome(_reports(writer), seen, data_hash, loss, executor.plan.strategy, executor.plan.why)
    if writer.cache is not None:
        _finish(writer.cache, outcome, processes)
    return outcome


def _mean_recipe(options: InitOptions, pieces: list[Piece], processes: Processes) -> Recipe:
    """The recipe with η/n for η: a step of η along the mean of n gradients is one of η/n along their sum.

    Needed for SGD only, as sign(G) is scale-invariant.
    """
    # With a loss_fn, labels have no meaning that is known here: every row counts.
    rows = labeled_rows if options.loss_fn is None else batch_size
    own = sum(rows(piece.batch) for piece in pieces if piece.counts)
    return replace(options.recipe, lr=options.recipe.lr / max(1, sum(processes.all_gather(own))))


def _finish(cache: Cache, outcome: Outcome, processes: Processes) -> None:
    """Write the cache on rank 0; errors are raised on every rank."""
    error: Exception | None = None
    facts: dict[str, Any] = {"loss": outcome.loss, "num_samples": outcome.num_samples, "data": outcome.data_hash}
    facts["not_reached"] = [layer.name for layer in outcome.layers if layer.fallback]
    try:
        if processes.rank == 0:
            cache.finish(facts | {"strategy": outcome.strategy})
    except Exception as caught:
        error = caught
    processes.raise_on_every_rank(error)


def from_weights(layers: Layers, init: str, adapter: str, seed: int, progress: bool, held_back: float = 0.0) -> Outcome:
    """Write the data-free inits, LoRA-XS, Kaiming or random; layers are written after all of them are factored.

    Raises:
        ValueError: a weight has NaN or Inf entries.
    """
    recipe, results = Recipe(adapter, 1.0, "none", seed), {}
    bar = tqdm(layers.items(), desc="factoring", unit="layer", disable=not progress, leave=False, delay=PROGRESS_DELAY)
    for name, layer in bar:
        started, shape = time.perf_counter(), (layer.out_features, layer.in_features)
        factors = _factors_of_weight(name, layer, init, recipe)
        sigma = tuple(float(value) for value in factors.sigma)
        seconds = time.perf_counter() - started
        results[name] = factors, LayerReport(name, shape, layer.adapters[adapter].r, None, None, sigma, 0, seconds)
    # After the loop: a weight with NaN in the last layer leaves the first layer unchanged, too.
    with Staging(adapter, held_back) as staging:
        for name, (factors, _) in results.items():
            staging.write(layers[name], factors)
    return Outcome([report for _, report in results.values()])


@torch.no_grad()
def _factors_of_weight(name: str, layer: LoRASBLinear, init: str, recipe: Recipe) -> Factors:
    """One layer's factors from its weight W [out, in], or from a random matrix of its shape."""
    r, seed = layer.adapters[recipe.adapter].r, recipe.seed_of(name)
    if init == "random":
        return random_subspace((layer.out_features, layer.in_features), r, seed)
    # accelerate keeps offloaded weights on the meta device outside of their layer's forward.
    with weight_present(layer.get_base_layer()), full_precision():
        weight = layer.dense_weight().detach().float()
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"the weight of layer {name!r} has NaN or Inf entries: load the base model again, or name the layer in "
                "exclude_modules"
            )
        if init.startswith("lora-xs"):
            return lora_xs(weight, r, seed, "output" if init == "lora-xs-output" else "input")
        return kaiming(weight, r, layer.adapters[recipe.adapter].scaling, seed)


def _samples(
    model: nn.Module, batches: Any, options: InitOptions, processes: Processes
) -> tuple[list[Piece], int, str | None]:
    """Micro-batches of this rank, the number of samples over all ranks, and the hash of all samples."""
    if batches is None:
        return [], 0, None
    samples = select(batches, options.num_samples, options.recipe.seed, processes)
    batches, selected = collect(samples, processes)
    seen = sum(processes.all_gather(selected.seen))
    # Over all ranks: one rank's share without labels is no error.
    if options.loss_fn is None and not any(processes.all_gather(int(any(not unlabeled(batch) for batch in batches)))):
        raise ValueError("no sample has a labeled token: every label of these batches is -100")
    pieces = list(stored_16bit(batches)) if options.stability else [Piece(batch) for batch in batches]
    if processes.is_distributed and sharded(model):
        if getattr(options.loss_fn, "of_whole_batches", False):
            raise ValueError(
                "a sharded model takes samples one by one, and this loss needs whole batches (pairs): initialize "
                "before the model is sharded"
            )
        pieces = _equally_many(pieces, processes)
    return pieces, seen, processes.common_hash(selected.data_hash)


def _equally_many(pieces: list[Piece], processes: Processes) -> list[Piece]:
    """Split batches into single-sample pieces, equally many per rank: a sharded model's forward all-gathers parameters.

    Ranks with fewer samples run pieces that do not count. Samples without a label are dropped first, because they make
    no backward, and FSDP2 communicates in the backward too.
    """
    single = [
        Piece(take_rows(piece.batch, torch.tensor([i])), piece.first_half)
        for piece in pieces
        for i in range(batch_size(piece.batch))
    ]
    single = [piece for piece in single if not unlabeled(piece.batch)]
    # A rank with an empty share has no batch to run: it borrows one.
    filler: Batch | None = processes.broadcast_any_batch(single[0].batch if single else None)
    count = max(processes.all_gather(len(single)))
    return single + [Piece(filler, counts=False) for _ in range(count - len(single))] if filler is not None else single


def _execute_plan(work: Work, writer: LayerWriter, options: InitOptions) -> Executor:
    """Take sums, block by block or pass by pass, and factor each before the next ones are taken."""
    show = options.progress and work.processes.rank == 0
    plan = _plan(work, options)
    if writer.cache is not None:
        # A run may resume only if it goes through the same blocks and targets in the same way.
        writer.cache.course = [plan.stack.course if plan.stack is not None else "", sorted(work.layers), work.halves]
    if show:  # before the work, as the estimate may be a reason to interrupt it
        tqdm.write(f"lorasb: {plan}")
    executor = Executor(work, plan, options.strategy == "layerwise", options.memory_budget, show)
    # Gradients at a block boundary differ by rank, and only rank 0 writes the cache: no resuming across ranks.
    progress = writer.cache if not work.processes.is_distributed else None
    for sums in executor.sums(progress):
        executor.done.update(writer.write_sums(sums))
    writer.write_resumed()
    return executor


def _plan(work: Work, options: InitOptions) -> InitPlan:
    """Make a plan; a rank that has not the memory raises its error, and the other ranks one that names it."""
    plan, error = None, None
    try:
        plan = make_plan(work, options.strategy, options.blocks, options.memory_budget)
    except Exception as caught:
        error = caught
    work.processes.raise_on_every_rank(error)
    if plan is None:  # not reached; narrows the type
        raise RuntimeError("no plan")
    return plan


def _from_cache(model: nn.Module, writer: LayerWriter, cache: Cache, gradients: dict[str, CachedGradient]) -> Outcome:
    writer.write_cached(gradients)
    writer.write_fallbacks(model, [name for name in writer.layers if name not in gradients])
    facts = cache.facts
    why = f"signs from {cache.path}, no backward"
    return Outcome(_reports(writer), facts["num_samples"], facts["data"], facts["loss"], "cache", why)


def _reports(writer: LayerWriter) -> list[LayerReport]:
    """Reports in the model's order; layers are factored from the last to the first."""
    return [writer.reports[name] for name in writer.layers if name in writer.reports]
