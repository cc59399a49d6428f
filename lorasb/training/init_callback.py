"""`lorasb.InitCallback`: initializes an adapter inside a `transformers.Trainer`, from its data and schedule."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from accelerate.data_loader import IterableDatasetShard
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.shared_factors import share
from ..distributed.process_group import Processes, sharded
from ..distributed.sharded_factors import keep_factors, restore_factors
from ..init import InitReport, first_step_lr, initialize
from ..init.loss import labeled_rows
from ..init.sampling import Batch, Loader, draw, rng_untouched, too_few
from ..init.sampling import batch_size as count_rows
from ..init.task import AutoRate, Layers
from ..layers.lookup import adapted_layers
from .rate_trials import JUDGED, PROBE_STEPS, apart, refine_rate

# DPO's columns under `precompute_ref_log_probs`: one number per pair, while other columns have two rows. Not needed: at
# the start of training the policy equals the reference.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
TRAINERS_RATE = 5e-5  # default learning_rate of TrainingArguments


class InitCallback(TrainerCallback):
    """Runs `lorasb.initialize` when training begins: `Trainer(..., callbacks=[lorasb.InitCallback()])`.

    Samples are drawn from the trainer's data set with a separate seed and collated by the trainer's collator; the
    training order does not change. η is the peak learning rate divided by the number of warm-up steps (at least 1), as
    a schedule's first rate is 0. An initialized adapter is left alone. If training resumes from a checkpoint, A, B and
    R come from it; under FSDP, which loads only R, the callback loads A and B.

    Args:
        num_samples: number of samples over all processes; None takes min(n, max(32, n/1000)).
        seed: for sampling and the SVD; the trainer's `seed` by default.
        lr: η, instead of the one derived from the trainer's rate. "auto" measures a peak rate on the samples, tries it
            and a quarter of it for four steps each (not with `samples`, nor if the model is sharded), and trains at
            twice or half the measured rate (docs/choosing.md). It replaces `learning_rate` in the optimizer, which must
            be an Adam, and in the schedule, which must be one of transformers'.
        samples: batches to use instead of the trainer's data, or a function that makes them from the model when
            training begins: for reinforcement learning, whose data has prompts but no labels.
        share_factors: let the run's checkpoints share one file with A and B: each later one adds R and the optimizer
            state. Every checkpoint folder can still be loaded by itself.
        options: options of `lorasb.initialize` (`longest_start=`, `cache=`, `loss_fn=`, ...).

    Attributes:
        report: the `InitReport`, once training has begun; None if nothing was initialized.

    Raises:
        ValueError: the optimizer holds copies of R, which would overwrite the initialized R; or training resumes, and
            the A and B that belong to R are not found.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        seed: int | None = None,
        lr: float | Literal["auto"] | None = None,
        samples: Iterable[Batch] | Callable[[PeftModel], Iterable[Batch]] | None = None,
        share_factors: bool = True,
        **options: Any,
    ) -> None:
        self.num_samples, self.seed, self.lr = num_samples, seed, lr
        self.samples, self.share_factors, self.options = samples, share_factors, options
        self.report: InitReport | None = None
        self._model: weakref.ref[PeftModel] | None = None  # the one that the report describes
        self._is_refined = False  # True once trials have refined the rate

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Split a written checkpoint into R and the shared factor file."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        uploading = args.push_to_hub and "checkpoint" in str(getattr(args.hub_strategy, "value", args.hub_strategy))
        # Not while uploading: the Hub's upload reads the folder in the background, and `share` rewrites its files.
        if self.share_factors and state.is_world_process_zero and folder.is_dir() and not uploading:
            share(folder)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Loader = None,
        optimizer: Optimizer | None = None,
        lr_scheduler: object = None,
        **kwargs: object,
    ) -> None:
        """Initialize, or restore A and B; a checkpoint, if any, is loaded by now, and no step has been taken."""
        name, layers = adapted_layers(model, self.options.get("adapter_name"))
        _refuse_best(args, next(iter(layers.values())).active_adapters)
        initialized = all(layer.is_initialized(name) for layer in layers.values())
        resumed = state.global_step > 0
        # Resumed. FSDP's checkpoints have only trainable parameters: R is loaded, while A and B are still those of the
        # new patch, even if a data-free init has filled them.
        if resumed and (sharded(model) or not initialized):
            _restore(args, state, name, layers, needed=not initialized)
        # Under ZeRO-3 gathering is collective and saving is not, so A and B are gathered here; no-op otherwise.
        keep_factors(layers, name, first=state.is_world_process_zero)
        peak = _peak(optimizer, layers, name) or args.learning_rate
        # True on a restart: a trial ran out of memory, and the trainer begins again with a smaller batch.
        here = self._model is not None and self._model() is model
        if resumed or (initialized and not here):
            lost = resumed and optimizer is not None and not optimizer.state
            if self.lr == "auto" and (lost or not resumed):
                why = f"adapter {name!r} is initialized already, so that no rate is measured"
                if lost:
                    why = "the checkpoint lacks the optimizer (save_only_model), which has the measured rate"
                warnings.warn(f"{why}: learning_rate={peak:g} stays", stacklevel=2)
            return
        if optimizer is not None:
            _refuse_copies(optimizer, layers, name)
        size = state.train_batch_size or args.per_device_train_batch_size  # the first reflects `auto_find_batch_size`
        if not initialized:
            warmup = args.get_warmup_steps(state.max_steps) if lr_scheduler is None else _warmup_steps(lr_scheduler)
            lr: float | AutoRate = first_step_lr(peak, warmup) if self.lr is None or self.lr == "auto" else self.lr
            if self.lr == "auto" and _takes_rates(optimizer, lr_scheduler, peak):
                lr = first_step_lr("auto", warmup)
                given = args.lr_scheduler_kwargs
                if floor := given.get("min_lr") if isinstance(given, dict) else None:
                    why = f"the schedule's min_lr={floor:g} is taken relative to learning_rate={peak:g}"
                    warnings.warn(f"{why}, which lr='auto' replaces: pass min_lr_rate", stacklevel=2)
            elif self.lr is None and peak == TRAINERS_RATE:
                why = f"R trains at Trainer's default learning_rate={peak:g}, which is far below R's rates"
                warnings.warn(f"{why}: InitCallback(lr='auto'), or pass a learning_rate", stacklevel=2)
            self.report = self._initialize(lr, size, args, model, train_dataloader)
            self._model, self._is_refined = weakref.ref(model), False
        report = self.report
        if report is None or report.rate is None:
            return
        if not self._is_refined and self.samples is None and not sharded(model):
            found = self._refined(report.rate, name, size, args, model, train_dataloader)
            start = None if report.lr is None else report.lr * found / report.rate
            self.report, self._is_refined = replace(report, rate=found, lr=start), True
            report = self.report
        if optimizer is not None and report.rate is not None:
            _set_rate(report.rate, optimizer, lr_scheduler, layers, name)

    def _initialize(
        self, lr: float | AutoRate, size: int, args: TrainingArguments, model: PeftModel, data: Loader
    ) -> InitReport:
        """Call `initialize` on this process's samples, in batches of `size`."""
        seed, count = args.seed if self.seed is None else self.seed, self.num_samples
        options = {"progress": not args.disable_tqdm} | self.options
        # collators may draw random numbers (masking, on the CPU); training must draw the same ones as without this
        with rng_untouched():
            if self.samples is None:
                # limited already: a second limit would count batch rows, and preference data has two per example
                batches, count = _batches(data, size, count, seed), None
            else:  # all of them, in order, unless num_samples is given
                with Processes().together("making samples"):
                    batches = iter(self.samples(model) if callable(self.samples) else self.samples)
            return initialize(model, batches, lr=lr, **options | {"seed": seed, "num_samples": count})

    def _refined(
        self, rate: float, name: str, size: int, args: TrainingArguments, model: PeftModel, data: Loader
    ) -> float:
        """Return the rate, doubled or halved by trials on this process's data, to which R is scaled."""
        parts = args.gradient_accumulation_steps
        seed = 1 + (args.seed if self.seed is None else self.seed)  # not the initialization's samples
        loss_fn, count = self.options.get("loss_fn"), self.num_samples  # for a stream, whose first items are read again
        if _is_sized(data.dataset):
            count = min(len(data.dataset), (PROBE_STEPS * parts + JUDGED) * size * Processes().world_size)
        if count is not None:  # at least two batches: one to measure the loss, one to train on
            size = max(1, min(size, count // (2 * Processes().world_size)))
        with Processes().together("reading batches for trials of the rate"), rng_untouched():
            held = [batch for batch in _batches(data, size, count, seed) if loss_fn or labeled_rows(batch)]
        if not all(Processes().all_gather(len(held))):
            why = "a process has no labeled rows to try rates on"
            warnings.warn(f"{why}: {rate:.2g} stays as measured", stacklevel=3)
            return rate
        options = {"loss_fn": loss_fn, "progress": self.options.get("progress", not args.disable_tqdm)}
        return refine_rate(model, apart(held), rate, accumulation=parts, adapter=name, **options).lr


def _refuse_best(args: TrainingArguments, active: list[str]) -> None:
    """Raise if Trainer would load another adapter's file as the best checkpoint."""
    if args.load_best_model_at_end and active[:1] != ["default"]:
        raise ValueError(
            "expected the active adapter 'default' with load_best_model_at_end, as Trainer loads its file into the "
            f"active one, got {', '.join(active) or 'none'}: leave it out, and load the best checkpoint's folder with "
            "model.load_adapter"
        )


def _takes_rates(optimizer: object, scheduler: object, rate: float) -> bool:
    """Return True for a variant of Adam with one of transformers' schedules, as lr="auto" requires; else warn."""
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps both
    schedule = getattr(scheduler, "scheduler", scheduler)
    if optimizer is not None and "adam" not in kind.lower():
        why = f"lr='auto' predicts steps of AdamW, and the optimizer is {kind}"
    elif schedule is not None and not isinstance(schedule, LambdaLR):  # others store their own peaks
        why = f"lr='auto' sets the peak of transformers' schedules, and the schedule is a {type(schedule).__name__}"
    else:
        return True
    warnings.warn(f"{why}: learning_rate={rate:g} stays", stacklevel=3)
    return False


def _is_sized(dataset: object) -> bool:
    return hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def _groups(optimizer: Optimizer, layers: Layers, name: str) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """Yield index and parameter group of each group that has an R, and whether it has other parameters, too."""
    cores = {id(layer.lorasb_R[name]) for layer in layers.values()}
    for i, group in enumerate(optimizer.param_groups):
        mine = [id(parameter) in cores for parameter in group["params"]]
        if any(mine):
            yield i, group, not all(mine)


def _peak(optimizer: Optimizer | None, layers: Layers, name: str) -> float | None:
    """Return the peak rate of R's parameter group (with OneCycleLR its `max_lr`); None without an optimizer."""
    groups = () if optimizer is None else (group for _, group, _ in _groups(optimizer, layers, name))
    return next((group.get("max_lr", group.get("initial_lr", group["lr"])) for group in groups), None)


def _warmup_steps(scheduler: object) -> float:
    """Return a transformers schedule's warm-up: 1 / (share of the peak at its first nonzero rate); 0 for others."""
    schedule = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(schedule, LambdaLR):
        return 0
    # In a warm-up of N steps the share is step / N, which is 0 at step 0.
    return 1 / min(1.0, next((share for share in map(schedule.lr_lambdas[0], (0, 1)) if share > 0), 1.0))


def _set_rate(rate: float, optimizer: Optimizer, scheduler: object, layers: Layers, name: str) -> None:
    """Set the peak rate of R's parameter groups, keeping their ratios; other groups (a head's) keep their rates."""
    schedule = getattr(scheduler, "scheduler", scheduler)
    peaks, last = (getattr(schedule, name, None) for name in ("base_lrs", "_last_lr"))  # the second is logged
    first = _peak(optimizer, layers, name)
    for i, group, is_shared in _groups(optimizer, layers, name):
        if is_shared:
            groups = "torch.optim.AdamW(lorasb.parameter_groups(model, lr=1e-3, other_lr=1e-3))"
            warnings.warn(
                f"modules other than R (a head) train at R's rate {rate:.2g}, as they share its parameter group: pass "
                f"Trainer(optimizers=({groups}, None))",
                stacklevel=3,
            )
        peak = group.get("initial_lr", group["lr"])
        mine = rate * (peak / first) if first else rate
        group["lr"] = group["lr"] * mine / peak if peak else group["lr"]
        group["initial_lr"] = mine
        if peaks is not None and last is not None:
            peaks[i], last[i] = mine, group["lr"]


def _restore(args: TrainingArguments, state: TrainerState, name: str, layers: Layers, needed: bool) -> None:
    # Callbacks do not get the folder: `trainer.train(resume_from_checkpoint=...)` does not set `args`.
    named = [Path(args.resume_from_checkpoint)] if isinstance(args.resume_from_checkpoint, str) else []
    folders = [*named, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"]
    if not restore_factors(layers, name, folders) and needed:
        raise ValueError(
            "training resumes, and R alone was loaded: expected an adapter that has this R, with its A and B, in "
            f"{' or '.join(map(str, folders))}, found none. If the checkpoint is elsewhere, pass its folder to "
            "TrainingArguments(resume_from_checkpoint=...) as well as to trainer.train(resume_from_checkpoint=...)"
        )


def _batches(loader: Loader, batch_size: int, num_samples: int | None, seed: int) -> Iterator[Batch]:
    """Yield batches of this process's share: random samples of a map-style data set, or a stream's first items."""
    dataset, processes = loader.dataset, Processes()
    if isinstance(dataset, IterableDatasetShard):  # limited to this process's rows: unwrap it
        dataset = dataset.dataset
    if not _is_sized(dataset):
        if num_samples is None:
            raise ValueError("the trainer's data set is a stream: say how many samples, InitCallback(num_samples=64)")
        # Every process reads the same head of the stream and takes every size-th item.
        head = list(itertools.islice(dataset, num_samples))
        if len(head) < num_samples:
            raise ValueError(too_few(num_samples, len(head)))
        remaining = iter(head[processes.rank :: processes.world_size])
    else:
        chosen = draw([len(dataset)], num_samples, seed, rank=0)  # the same on every process
        remaining = (dataset[i] for i in chosen[processes.rank :: processes.world_size])  # read batch by batch
    while batch := list(itertools.islice(remaining, batch_size)):
        collated = loader.collate_fn(batch)
        if len(batch) > 1 and isinstance(collated, Mapping) and not _has_rows(collated):  # images cut into patches
            remaining, batch_size = itertools.chain(batch, remaining), 1
            continue
        if not isinstance(collated, Mapping):
            raise ValueError(
                f"expected trainer batches of tokens with labels, got {type(collated).__name__}s, as with GRPO's "
                "prompts: pass batches of examples, InitCallback(samples=batches), or of rewards, "
                "InitCallback(samples=lambda model: lorasb.reward_batches(model, tokenizer, prompts, reward), "
                "loss_fn=lorasb.policy_loss)"
            )
        yield {name: value for name, value in collated.items() if name not in REFERENCE}


def _has_rows(batch: Mapping[str, object]) -> bool:
    try:
        count_rows(batch)
    except ValueError:
        return False
    return True


def _refuse_copies(optimizer: Optimizer, layers: Layers, name: str) -> None:
    """Raise if the optimizer holds copies of R: its next step would write them over the initialized R."""
    # Optimizers with fp32 master weights and DeepSpeed's partitions are made before `on_train_begin`, from the old R.
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [layer for layer, module in layers.items() if id(module.lorasb_R[name]) not in optimized]
    # Frozen parameters are not in the optimizer: report that first, as "copies" would be the wrong reason.
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
