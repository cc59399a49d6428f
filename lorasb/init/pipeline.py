"""One initialization from start to end: samples, plan, sums, factors, cache, report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..distributed.process_group import Processes, sharded
from ..layers.linear import LoRASBLinear
from ..layers.offloading import weight_present
from .factors.factorize import Recipe
from .factors.layer_writer import Filling
from .factors.methods import Factors, kaiming, lora_xs
from .factors.sign_cache import Cache, CachedGradient
from .factors.transaction import Staging
from .gradients.executor import Strategy
from .gradients.frozen_model import undisturbed
from .gradients.loss import LossFn, labeled_rows, unlabeled
from .gradients.plan import Plan, make_plan
from .gradients.task import Layers, Piece, Work, in_halves
from .linalg.svd import full_precision
from .report.init_report import LayerReport
from .report.provenance import cache_key
from .sampling import Batch, batch_size, collect, select, take_rows

SECONDS = 2.0  # what takes less needs no progress bar


@dataclass(frozen=True)
class Options:
    """What `initialize` was asked for, beside the model and the samples."""

    recipe: Recipe
    num_samples: int | None = None
    strategy: str = "auto"
    blocks: str | None = None
    memory_budget: float | None = None
    loss_fn: LossFn | None = None
    cache: str | os.PathLike[str] | None = None
    stability: bool = False
    progress: bool = True


@dataclass
class Outcome:
    """What an initialization found."""

    layers: list[LayerReport] = field(default_factory=list)
    num_samples: int = 0
    data_hash: str | None = None
    loss: float | None = None
    strategy: str = "none"
    why: str = ""


def from_gradients(model: nn.Module, layers: Layers, batches: Any, options: Options, staging: Staging) -> Outcome:
    """Factors from the gradients of the samples, or from a cache of their signs."""
    processes = Processes()
    pieces, seen, data_hash = _samples(model, batches, options, processes)
    recipe = _of_the_mean(options, pieces, processes) if options.recipe.update == "sgd" else options.recipe
    filling = Filling(layers, recipe, processes, staging, options.stability)
    if options.cache is not None:
        first, seed = next(iter(layers.values())), options.recipe.seed
        key = cache_key(model, first, options.recipe.update, seed, seen, data_hash, options.loss_fn)
        filling.cache = Cache(options.cache, key, batches is not None)
        found = filling.cache.load(list(layers))
        if found is not None and options.stability:
            raise ValueError("stability compares halves of the samples, and a cache keeps their sum: leave cache out")
        if found is not None:
            return _from_cache(model, filling, filling.cache, found)
    work = Work(model, layers, pieces, options.loss_fn, processes, options.stability, options.recipe.update == "sgd")
    with undisturbed(model):
        strategy = _carry_out(work, filling, options)
        filling.stand_in(model, [name for name in layers if name not in filling.reports])
    loss, labeled = processes.all_reduce_sum(torch.tensor([work.loss, work.labeled], dtype=torch.float64)).tolist()
    loss /= labeled
    outcome = Outcome(_in_order(filling), seen, data_hash, loss, strategy.plan.strategy, strategy.plan.why)
    if filling.cache is not None:
        _finish(filling.cache, outcome, processes)
    return outcome


def _of_the_mean(options: Options, pieces: list[Piece], processes: Processes) -> Recipe:
    """A step along the mean of n gradients is one of η/n along their sum; signs do not know the difference."""
    rows = labeled_rows if options.loss_fn is None else batch_size
    own = sum(rows(piece.batch) for piece in pieces if piece.counts)
    return replace(options.recipe, lr=options.recipe.lr / max(1, sum(processes.all_gather(own))))


def _finish(cache: Cache, outcome: Outcome, processes: Processes) -> None:
    """Write the cache, on rank 0; all of them meet what goes wrong."""
    error: Exception | None = None
    facts: dict[str, Any] = {"loss": outcome.loss, "num_samples": outcome.num_samples, "data": outcome.data_hash}
    facts["not_reached"] = [layer.name for layer in outcome.layers if layer.fallback]
    try:
        if processes.rank == 0:
            cache.finish(facts | {"strategy": outcome.strategy})
    except Exception as caught:
        error = caught
    processes.raise_on_every_rank(error)


def from_weights(layers: Layers, init: str, adapter: str, seed: int, progress: bool) -> Outcome:
    """The data-free inits: LoRA-XS's and Kaiming's, written once all are found.

    Raises:
        ValueError: a weight has NaN or Inf entries.
    """
    recipe, found = Recipe(adapter, 1.0, "none", seed), {}
    bar = tqdm(layers.items(), desc="factoring", unit="layer", disable=not progress, leave=False, delay=SECONDS)
    for name, layer in bar:
        started, shape = time.perf_counter(), (layer.out_features, layer.in_features)
        factors = _of_weight(name, layer, init, recipe)
        sigma = tuple(float(value) for value in factors.sigma)
        seconds = time.perf_counter() - started
        found[name] = factors, LayerReport(name, shape, layer.r[adapter], None, None, sigma, 0, seconds)
    with Staging(adapter) as staging:
        for name, (factors, _) in found.items():
            staging.write(layers[name], factors)
    return Outcome([report for _, report in found.values()])


@torch.no_grad()
def _of_weight(name: str, layer: LoRASBLinear, init: str, recipe: Recipe) -> Factors:
    """One layer's factors from its weight W [out, in], or from a random matrix of its shape."""
    r, seed = layer.r[recipe.adapter], recipe.seed_of(name)
    with weight_present(layer.get_base_layer()), full_precision():
        weight = layer.dense_weight().detach().float()
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"the weight of layer {name!r} has NaN or Inf entries: load the base model again, or name the layer in "
                "exclude_modules"
            )
        if init == "lora-xs":
            return lora_xs(weight, r, seed)
        return kaiming(weight, r, layer.scaling[recipe.adapter], seed)


def _samples(
    model: nn.Module, batches: Any, options: Options, processes: Processes
) -> tuple[list[Piece], int, str | None]:
    """Micro-batches of this process, the number of samples of all, and a hash of them."""
    if batches is None:
        return [], 0, None
    samples = select(batches, options.num_samples, options.recipe.seed, processes)
    found, mine = collect(samples, processes)
    seen = sum(processes.all_gather(mine.seen))
    if options.loss_fn is None and not any(processes.all_gather(int(any(not unlabeled(batch) for batch in found)))):
        raise ValueError("no sample has a labeled token: every label of these batches is -100")
    pieces = list(in_halves(found)) if options.stability else [Piece(batch) for batch in found]
    if processes.is_distributed and sharded(model):
        pieces = _in_step(pieces, processes)
    return pieces, seen, processes.common_hash(mine.data_hash)


def _in_step(pieces: list[Piece], processes: Processes) -> list[Piece]:
    """Equally many single samples for every process, as all of them have to take part in every forward."""
    single = [
        Piece(take_rows(piece.batch, torch.tensor([i])), piece.first_half)
        for piece in pieces
        for i in range(batch_size(piece.batch))
    ]
    single = [piece for piece in single if not unlabeled(piece.batch)]
    filler: Batch | None = processes.broadcast_any_batch(single[0].batch if single else None)
    count = max(processes.all_gather(len(single)))
    return single + [Piece(filler, counts=False) for _ in range(count - len(single))] if filler is not None else single


def _carry_out(work: Work, filling: Filling, options: Options) -> Strategy:
    """Sums, layer by layer or pass by pass, into factors."""
    show = options.progress and work.processes.rank == 0
    plan = _plan(work, options)
    if filling.cache is not None:
        filling.cache.course = [plan.stack.course if plan.stack is not None else "", sorted(work.layers), work.halves]
    if show:
        tqdm.write(f"lorasb: {plan}")
    strategy = Strategy(work, plan, options.strategy == "layerwise", options.memory_budget, show)
    keeper = filling.cache if not work.processes.is_distributed else None
    for sums in strategy.sums(keeper):
        strategy.done.update(filling.take(sums))
    filling.take_finished()
    return strategy


def _plan(work: Work, options: Options) -> Plan:
    """A plan, or what every process says where one has not the memory."""
    plan, error = None, None
    try:
        plan = make_plan(work, options.strategy, options.blocks, options.memory_budget)
    except Exception as caught:
        error = caught
    work.processes.raise_on_every_rank(error)
    if plan is None:
        raise RuntimeError("no plan")
    return plan


def _from_cache(model: nn.Module, filling: Filling, cache: Cache, found: dict[str, CachedGradient]) -> Outcome:
    filling.take_cached(found)
    filling.stand_in(model, [name for name in filling.layers if name not in found])
    facts = cache.facts
    why = f"signs from {cache.path}, no backward"
    return Outcome(_in_order(filling), facts["num_samples"], facts["data"], facts["loss"], "cache", why)


def _in_order(filling: Filling) -> list[LayerReport]:
    return [filling.reports[name] for name in filling.layers if name in filling.reports]
