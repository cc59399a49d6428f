"""`lorasb.InitCallback`: initialization inside a `transformers.Trainer`, from its own data and schedule."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ..checkpoints.shared_factors import share
from ..distributed.deepspeed_zero import keep_factors
from ..distributed.fsdp_resume import restore_factors
from ..distributed.process_group import Processes, sharded
from ..init import InitReport, first_step_lr, initialize
from ..init.sampling import draw
from ..layers.linear import LoRASBLinear
from ..layers.lookup import adapted_layers


class InitCallback(TrainerCallback):
    """Runs `lorasb.initialize` when training begins: `Trainer(..., callbacks=[lorasb.InitCallback()])`.

    Samples are drawn from the trainer's data set by a seed of its own and collated as the trainer collates, so that
    the order of training stays what it would have been. η is the peak learning rate over the number of warm-up steps
    (at least 1): a schedule's very first rate is 0. Nothing happens where the adapter is initialized already. Where
    training resumes from a checkpoint, A, B and R come from it: FSDP loads R alone, and the callback A and B.

    Args:
        num_samples: how many, over all processes; None takes min(n, max(32, n/1000)).
        seed: of the drawing and of the SVD; the trainer's `seed` unless given.
        lr: η, where it is not to come from the trainer's arguments.
        share_factors: let the run's checkpoints share one file of A and B, which never change: each further checkpoint
            adds R and the optimizer's state. Every folder still loads by itself (`shared_factors`).
        options: of `lorasb.initialize` (`longest_start=`, `cache=`, `loss_fn=`, ...).

    Attributes:
        report: the `InitReport`, once training has begun; None where nothing was done.

    Raises:
        ValueError: the optimizer holds copies of R, which would overwrite what initialization writes; or training
            resumes, and the A and B that belong to R are nowhere.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        seed: int | None = None,
        lr: float | None = None,
        share_factors: bool = True,
        **options: Any,
    ) -> None:
        self.num_samples, self.seed, self.lr, self.options = num_samples, seed, lr, options
        self.share_factors = share_factors
        self.report: InitReport | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer after it has written a checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        uploading = args.push_to_hub and "checkpoint" in str(getattr(args.hub_strategy, "value", args.hub_strategy))
        if self.share_factors and state.is_world_process_zero and folder.is_dir() and not uploading:
            share(folder)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer, after it has loaded a checkpoint and before its first step."""
        name, layers = adapted_layers(model, self.options.get("adapter_name"))
        initialized = all(layer.is_initialized(name) for layer in layers.values())
        if state.global_step > 0 and (sharded(model) or not initialized):
            _restore(args, state, name, layers, needed=not initialized)
        keep_factors(layers, name, first=state.is_world_process_zero)
        if state.global_step > 0 or initialized:
            return
        _refuse_copies(optimizer, layers, name)
        lr = self.lr or first_step_lr(args.learning_rate, args.get_warmup_steps(state.max_steps))
        seed = args.seed if self.seed is None else self.seed
        options = {"progress": not args.disable_tqdm} | self.options
        with _rng_untouched():
            batches, count = _batches(train_dataloader, args.per_device_train_batch_size, self.num_samples, seed)
            self.report = initialize(model, batches, lr=lr, seed=seed, num_samples=count, **options)


def _restore(args: Any, state: Any, name: str, layers: dict[str, LoRASBLinear], needed: bool) -> None:
    """Load A and B from where the checkpoint may lie that training resumes from: the trainer does not tell."""
    said = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    folders = [*said, Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    if not restore_factors(layers, name, folders) and needed:
        raise ValueError(
            "training resumes, and R alone was loaded: expected an adapter that has this R, with its A and B, in "
            f"{' or '.join(map(str, folders))}, found none. If the checkpoint lies elsewhere, name its folder to "
            "TrainingArguments(resume_from_checkpoint=...) too, as to trainer.train(resume_from_checkpoint=...)"
        )


def _batches(loader: Any, size: int, num_samples: int | None, seed: int) -> tuple[Iterator[dict[str, Any]], int]:
    """This process's share of the samples drawn, or of the first that a stream has; and their number over all."""
    dataset, processes, collate = loader.dataset, Processes(), loader.collate_fn
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        if num_samples is None:
            raise ValueError("the trainer's data set is a stream: say how many samples, InitCallback(num_samples=64)")
        first = [item for item, _ in zip(dataset, range(num_samples), strict=False)]
        return _collated(first[processes.rank :: processes.world_size], collate, size), num_samples
    chosen = draw(len(dataset), num_samples, seed)
    mine = chosen[processes.rank :: processes.world_size]
    return _collated((dataset[i] for i in mine), collate, size), len(chosen)


def _collated(items: Iterable[Any], collate: Any, size: int) -> Iterator[dict[str, Any]]:
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield dict(collate(batch))


def _refuse_copies(optimizer: Any, layers: dict[str, LoRASBLinear], name: str) -> None:
    """Raise where the optimizer does not step R itself: what it holds would be written over the new R."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [layer for layer, module in layers.items() if id(module.lorasb_R[name]) not in held]
    if not any(module.lorasb_R[name].requires_grad for module in layers.values()):
        raise ValueError(
            f"no R of adapter {name!r} requires a gradient, so nothing would train: model.set_adapter({name!r})"
        )
    if missing:
        raise ValueError(
            f"the optimizer does not hold R of layer {missing[0]!r} itself ({len(missing)} of {len(layers)}): copies "
            "in another precision, or partitions (DeepSpeed's), would overwrite it. Call lorasb.initialize(...) before "
            "making the Trainer; the callback may stay"
        )


@contextmanager
def _rng_untouched() -> Iterator[None]:
    """Collators may draw (random masking): what training draws afterwards stays the same."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
