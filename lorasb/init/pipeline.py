"""One initialization from samples to factors: selects samples, plans, sums gradients, factors, caches and reports."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..distributed.process_group import Processes, sharded
from .auto_rate import measured_rate
from .cache import Cache, cache_key
from .factorize import overlap
from .init_report import InitReport
from .loss import labeled_rows
from .plan import InitPlan
from .sampling import Batch, Loader, batch_size, rng_untouched, samples_hash, select, split_in_half, take_rows
from .strategies import Executor
from .svd import Triplets, full_precision, truncated_svd
from .task import AutoRate, InitOptions, Layers, Piece, Work, frozen_base
from .write import LayerWriter, Write


@torch.inference_mode(False)  # a caller's inference mode would give tensors without gradients
@rng_untouched()  # samplers and collators may draw random numbers, and some models do in evaluation
def from_gradients(
    model: nn.Module, layers: Layers, batches: Loader, options: InitOptions, write: Write
) -> tuple[InitReport, str | None]:
    """Write factors from the samples' gradients, or from cached signs; return the report and the data's hash."""
    # A collective: every rank calls it with its share of the batches.
    work, seen, data = _work(model, layers, batches, options)
    processes, cache, signs = work.processes, None, None
    if options.cache is not None:
        # Checked before any forward: a cache for other data or weights is refused at once.
        cache = Cache(options.cache, cache_key(model, layers, options, seen, data))
        with processes.together():
            signs = cache.load(list(layers))
        if len(set(processes.all_gather(int(signs is not None)))) > 1:  # nodes may have separate file systems
            raise ValueError(
                f"cache={str(options.cache)!r} exists for some processes only: name a file that all can read"
            )
    writer = LayerWriter(layers, _options_per_sum(work), processes, write, cache)
    if cache is not None and signs is not None:
        if options.stability:
            raise ValueError("stability compares halves of the samples, and a cache keeps their sum: leave cache out")
        writer.write_cached(signs)
        writer.write_fallbacks(model)
        facts, strategy, why = cache.facts, "cache", f"signs from {cache.path}, no backward"
    else:
        with frozen_base(model, options.adapter):
            plan = _execute_plan(work, writer)
            writer.write_fallbacks(model)
            # fp64, as counts of samples and sums of losses are reduced in one tensor.
            total = torch.tensor([work.loss, work.labeled], dtype=torch.float64)
            loss, labeled = processes.all_reduce_sum(total).tolist()
            if options.stability:
                _measure_stability(work, writer)
        facts = {"loss": loss / labeled, "num_samples": seen, "data": data, "strategy": plan.strategy}
        facts["not_reached"] = [name for name, one in writer.reports.items() if one.fallback]
        strategy, why = plan.strategy, plan.why
        with processes.together():
            if cache is not None and processes.rank == 0:
                cache.finish(facts)
    lr, rate = _scaled_to_rate(work)
    in_order = [writer.reports[name] for name in layers if name in writer.reports]
    seen, loss = facts["num_samples"], facts["loss"]
    report = InitReport("update", options.update, lr, seen, options.seed, loss, 0.0, in_order, strategy, why, rate=rate)
    report.longest_start = writer.options.longest_start
    return report, facts["data"]


def _scaled_to_rate(work: Work) -> tuple[float, float | None]:
    """Return the first step's η, and the rate that lr="auto" measures, to which R is then scaled, or None."""
    options = work.options
    if not isinstance(options.lr, AutoRate):
        return options.eta, None
    rate = measured_rate(work)
    lr = rate / options.lr.divisor
    with torch.no_grad():
        for layer in work.layers.values():
            layer.lorasb_R[options.adapter].mul_(lr / options.eta)
    return lr, rate


@rng_untouched()
def rate_of_initialized(model: nn.Module, layers: Layers, batches: Loader, options: InitOptions) -> float:
    """Measure the rate of lr="auto" for an adapter that already has its factors, in a forward over the samples."""
    return measured_rate(_work(model, layers, batches, options)[0])


def _options_per_sum(work: Work) -> InitOptions:
    """Return the options, for SGD with η/n: a step of η along the mean of n gradients is one of η/n along their sum."""
    options = work.options
    if options.update != "sgd":
        return options  # sign(G) is scale-invariant
    # With a loss_fn, the meaning of labels is unknown here: every row counts.
    rows = labeled_rows if options.loss_fn is None else batch_size
    own = sum(rows(piece.batch) for piece in work.pieces if piece.counts)
    # Theorem 6: the first step of SGD has no limit.
    return replace(options, lr=options.eta / max(1, sum(work.processes.all_gather(own))), longest_start=None)


def _work(model: nn.Module, layers: Layers, batches: Loader, options: InitOptions) -> tuple[Work, int, str | None]:
    """Return the work on this rank's micro-batches, the number of samples over all ranks, and their hash."""
    processes = Processes()
    if batches is None:
        return Work(model, layers, [], options, processes), 0, None
    batches = select(batches, options.num_samples, options.seed, options.whole_batches)
    seen = sum(processes.all_gather(sum(map(batch_size, batches))))
    # Checked over all ranks: a single rank's share may lack labels.
    if options.loss_fn is None and not any(processes.all_gather(sum(map(labeled_rows, batches)))):
        raise ValueError("no sample has a labeled token: every label of these batches is -100")
    pieces = [Piece(batch) for batch in batches]
    if processes.is_distributed and sharded(model):
        if options.whole_batches:
            raise ValueError("this loss needs whole batches (pairs): initialize before the model is sharded")
        pieces = _single_sample_pieces(batches, processes)
    return Work(model, layers, pieces, options, processes), seen, samples_hash(batches, processes)


def _single_sample_pieces(batches: list[Batch], processes: Processes) -> list[Piece]:
    """Split batches into single-sample pieces, equally many per rank, as sharded models all-gather in each forward."""
    # Ranks with fewer samples run pieces that do not count. Samples without a label are dropped first, because they
    # run no backward, and FSDP2 communicates in the backward too.
    rows = [take_rows(batch, torch.tensor([i])) for batch in batches for i in range(batch_size(batch))]
    single = [Piece(row) for row in rows if labeled_rows(row)]
    missing = max(processes.all_gather(len(single))) - len(single)
    # A rank with an empty share has no batch to run: it borrows one from the lowest rank that has any.
    own = {name: t for name, t in single[0].batch.items() if isinstance(t, Tensor)} if single else {}
    sent = {name: [t.tolist(), str(t.dtype).removeprefix("torch.")] for name, t in own.items()}
    lent: dict[str, Any] = next(filter(None, processes.gather_json(sent)), {})
    filler = {name: torch.tensor(values, dtype=getattr(torch, dtype)) for name, (values, dtype) in lent.items()}
    return single + [Piece(filler, counts=False)] * missing


def _execute_plan(work: Work, writer: LayerWriter) -> InitPlan:
    """Sum gradients block by block or pass by pass, and factor each block or pass before the next."""
    executor = Executor(work)
    if writer.cache is not None:  # a run may resume only with the same blocks and targets
        plan = executor.plan
        course = {"blocks and targets": [plan.stack.name if plan.stack else "", sorted(work.layers)]}
        writer.cache.partial_key = writer.cache.key | course | {"uncut blocks": plan.uncut}
    if executor.show:  # before the work, as the estimate may be a reason to interrupt it
        tqdm.write(f"lorasb: {executor.plan}")
    # Gradients at a block boundary differ by rank, and only rank 0 writes the cache: multi-rank runs cannot resume.
    for sums in executor.sums(writer.cache if not work.processes.is_distributed else None):
        executor.done.update(writer.write_sums(sums))
    if writer.cache is not None:  # blocks that an interrupted run finished were not recomputed in this one
        cached = writer.cache.layers.items()
        writer.write_cached({name: layer for name, layer in cached if name not in writer.reports})
    return executor.plan


def _measure_stability(work: Work, writer: LayerWriter) -> None:
    """Compare the subspaces of two halves of the samples, in another pass, and add the overlap to the reports."""
    halves, processes = _halves(work.pieces), work.processes
    if not all(any(processes.all_gather(len(half))) for half in halves):
        return  # a single sample
    own = {name for i, name in enumerate(work.layers) if i % processes.world_size == processes.rank}
    first, second = (_subspaces(replace(work, pieces=half), writer, own) for half in halves)
    # Skip layers that one of the halves did not reach.
    found = {name: overlap(first[name], second[name]) for name in first.keys() & second.keys()}
    for values in processes.gather_json(found):
        for name, value in values.items():
            writer.reports[name] = replace(writer.reports[name], stability=value)


def _halves(pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Assign the samples to two halves: every batch is split, and batches of one sample alternate."""
    halves: tuple[list[Piece], list[Piece]] = ([], [])
    turns = itertools.cycle(halves)
    for piece in pieces:
        parts = split_in_half(piece.batch)
        if len(parts) == 1:
            next(turns).append(piece)
            continue
        for half, part in zip(halves, parts, strict=True):
            half.append(Piece(part, piece.counts))
    return halves


def _subspaces(work: Work, writer: LayerWriter, own: set[str]) -> dict[str, Triplets]:
    """Return the leading triplets of sign(ΣG), on the CPU, of the layers whose SVDs this rank computes."""
    found, executor = {}, Executor(work)
    for sums in executor.sums(None):
        for name in writer.reached(sums):
            gradient, layer = writer.reduced(name, sums), work.layers[name]
            executor.done.add(name)
            if name not in own:
                continue
            signs = gradient.signs()
            if signs.finite and signs.zeros < layer.in_features * layer.out_features:
                with full_precision():
                    r, seed = layer.adapters[work.options.adapter].r, work.options.seed_of(name)
                    found[name] = Triplets(*(part.cpu() for part in truncated_svd(signs.bits, r, seed)))
    return found
