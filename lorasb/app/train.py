"""Train a run with `transformers.Trainer`, from the start or a checkpoint, and estimate its time and memory."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers import TrainerControl as Control
from transformers import TrainerState as State

import lorasb

from ..compat.transformers import on_one_device
from ..distributed.process_group import Processes
from ..init.sampling import Batch, split_in_half
from ..serving import basis
from ..serving.training import AdapterRowsCallback
from ..training.rate_trials import JUDGED, OTHER_RATE, PROBE_STEPS, STEPS, apart, find_lr, refine_rate
from ..utils.precision import DTYPES, native, slowdown
from ..utils.reading import Json, read_json
from .data import question_key
from .evaluation import Classification
from .prepare import Run, checkpoint_activations, device, load_adapters, save_adapter
from .run_folder import MarkedCheckpoints, RunFolder, read_mark
from .terminal import Stop, console
from .tokenize import ByLength, row_length

MAX_LOST_SECONDS = 600.0  # training time between checkpoints with --save-steps auto (stated in its help)
TIMED_STEPS = 5  # the first, which also loads libraries and allocates, counts only if it is alone
TIMED_SECONDS = 60.0  # after this time, fewer steps are enough
LONG_RUN = 30 * 60  # seconds; for longer runs a hint names the most expensive setting


def announcement(run: Run) -> str:
    """Return the line printed before training."""
    settings = run.settings
    where = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    begin, steps = f"on the {where} in {run.precision.name}:", f"{run.steps:,} steps of"
    if settings.rl is not None:
        return f"GRPO {begin} {steps} {settings.prompts_per_step} prompts, {settings.generations} completions each"
    rows = f"{len(run.rows):,} {'rows' if settings.packing else 'examples'} ({len(run.held_out.examples):,} held out)"
    passes = "" if settings.epochs or run.epochs == 1 else f" ({run.epochs:g} passes, --epochs auto)"
    task = "" if settings.data is not None else f" {settings.generated_task} (a generated task: no --data)"
    return f"Training{task} {begin} {rows}, {steps} {run.batch_size}{passes}, {run.tokens:,} tokens"


def remarks(run: Run) -> Iterator[str]:
    """Yield warnings about adapters with a single row, or with different answers to one prompt."""
    counts = Counter(example.adapter for example in run.train)
    alone = [name for name in run.adapters if counts[name] == 1]
    if alone:
        shown = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        yield f"{len(alone)} of {len(run.adapters)} adapters have one example to train on: {shown}"
    answers: dict[str, str] = {}
    for example in run.train if run.adapters else ():
        if answers.setdefault(question_key(example), example.completion) != example.completion:
            asked = f"adapter {example.adapter!r} has different answers to {example.prompt[:60]!r}"
            yield f"{asked}: if they are of two people, give each a name"
            return


def estimated(run: Run, seconds: float, memory: int) -> Iterator[str]:
    """Yield the estimated time and memory and, for a long run, the change of a setting that saves the most time."""
    yield f"Estimate from the first steps: about {duration(seconds)} and {memory / 1e9:.1f} GB"
    if seconds > LONG_RUN:
        name, saved = costliest(run, seconds)
        yield f"That is long, and {name} would save about {duration(saved)} of it"


def costliest(run: Run, seconds: float) -> tuple[str, float]:
    """Return the change of one setting that saves the most time, and the seconds it saves."""
    settings, name = run.settings, run.precision.name
    options = [(f"--epochs {run.epochs / 2:g} (half of the steps)", seconds / 2)]
    if device() == "cpu" and name != "float32" and name != native().name:
        options.append(("--dtype auto (float32 here)", seconds * (1 - 1 / max(1.0, slowdown(DTYPES[name])))))
    if run.epochs > 1:
        options.append(("--epochs 1", seconds * (1 - 1 / run.epochs)))
    if settings.gradient_checkpointing:
        # Two forwards and a backward (worth about two forwards) instead of one forward and a backward.
        options.append(("--no-gradient-checkpointing", seconds / 4))
    # Assumes time proportional to tokens, although attention is quadratic in the length.
    lengths, half = [row_length(row) for row in run.rows], settings.max_length // 2
    fraction = sum(min(length, half) for length in lengths) / sum(lengths)
    options.append((f"--max-length {half}", seconds * (1 - fraction)))
    return max(options, key=lambda option: option[1])


def duration(seconds: float) -> str:
    """Format seconds as readable text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """The process's peak memory in bytes: allocated by torch on a GPU, resident on the CPU."""
    return int(torch.cuda.max_memory_allocated()) if device() == "cuda" else peak_rss()


def peak_rss() -> int:
    """The process's peak resident memory in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not available on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # in KiB elsewhere


def memory_in_use() -> int:
    """Return the process's current memory in bytes, counted like `peak_memory`; on a GPU, reset the peak."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    return min(psutil.Process().memory_info().rss, peak_memory())


def estimate(
    times: list[tuple[float, int]], left: int, longest: int, memory: tuple[int, int], peak_before: int = 0
) -> tuple[float, int]:
    """Estimate the remaining seconds of training and the process's peak memory in bytes from the timed steps."""
    warm = times[1:] or times  # the first step also loads libraries and allocates memory
    rate = sum(seconds for seconds, _ in warm) / max(1, sum(tokens for _, tokens in warm))
    before, peak = memory
    # Activations grow with the tokens per step; weights and optimizer state are in `before` and in the peak.
    grown = max(0, peak - before) * longest / max(1, max(tokens for _, tokens in times)) if peak > peak_before else 0
    return rate * left, int(max(peak, before + grown))


Logs = Mapping[str, float] | None


class Saving(TrainerCallback):
    """Saves as `--save-steps` says, at the last step, and when the user stops the run; all ranks decide the same."""

    def __init__(self, save_steps: str, stop: Stop) -> None:
        self.save_steps = None if save_steps == "auto" else int(save_steps)
        self.stop, self.processes = stop, Processes()
        self.last_saved = self.step_started = self.longest_step = 0.0

    def on_train_begin(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        self.last_saved = time.perf_counter()

    def on_step_begin(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        """Decide whether to save and whether to stop."""
        now = time.perf_counter()
        self.longest_step = max(self.longest_step, now - self.step_started)
        if self.save_steps is None:
            # the next step, which may take as long as the longest one, would be lost too
            due = now - self.last_saved + self.longest_step > MAX_LOST_SECONDS
        else:
            due = state.global_step % self.save_steps == 0
        # Saving is collective, clocks differ between ranks, and a signal may reach only one: any rank decides for all.
        every = self.processes.all_gather(2 * self.stop.requested + due)  # both in one collective per step
        save, number = any(one % 2 for one in every), max(one // 2 for one in every)
        self.stop.requested = number
        if save or number or state.global_step >= state.max_steps:
            control.should_save, self.last_saved = True, now
        if number:  # after a save, so that the run resumes from this very step
            control.should_training_stop = True


class Planning(TrainerCallback):
    """Times the first steps, then prints an estimate of time and memory for the run."""

    def __init__(self, run: Run) -> None:
        self.run, self.order = run, run.order()
        # per step of the first epoch (later epochs are assumed to be alike), without padding, which is small
        self.tokens = [self._tokens(rows) for rows in self.order.order(0)]
        self.times: list[tuple[float, int]] = []
        self.memory_before, self.peak_before, self.started, self.printed = 0, 0, 0.0, False

    def on_train_begin(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        self.memory_before, self.peak_before = memory_in_use(), peak_memory()

    def on_step_begin(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        """Record a step's time; after the last timed step, print the estimate."""
        remaining_steps = state.max_steps - state.global_step
        if self.printed or not remaining_steps:
            return
        # global_step has been incremented by now, and counts over all epochs
        epoch, number = divmod(state.global_step - 1, len(self.tokens))
        rows_of_step = self.order.order(epoch)[number]
        self.times.append((time.perf_counter() - self.started, self._tokens(rows_of_step)))
        if len(self.times) < TIMED_STEPS and sum(seconds for seconds, _ in self.times[1:]) < TIMED_SECONDS:
            return
        self.printed = True
        tokens = round(sum(self.tokens) / len(self.tokens) * remaining_steps)
        peaks = self.memory_before, peak_memory()
        seconds, memory = estimate(self.times, tokens, max(self.tokens), peaks, self.peak_before)
        for line in estimated(self.run, seconds, memory):
            tqdm.write(line)  # print() would break the progress bar

    def _tokens(self, rows: list[int]) -> int:
        return sum(self.order.lengths[i] for i in rows)


class Epochs(TrainerCallback):
    """Sets the sampler's epoch, as accelerate's batch-skipping loader does not do so on resume."""

    def __init__(self, trainer: MarkedCheckpoints) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        self.trainer.set_epoch(int(state.epoch or 0))


class HeldOutLoss(TrainerCallback):
    """Logs the held-out loss every `every` steps."""

    def __init__(self, run: Run, trainer: MarkedCheckpoints, every: int) -> None:
        self.run, self.trainer, self.every = run, trainer, every

    def on_step_end(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        """Evaluate and log if this step is due."""
        if state.global_step % self.every == 0:
            loss = self.run.problem.mean_loss(self.run.model, self.run.tokenizer, self.run.held_out)
            # Trainer.log resets should_log, and the Trainer has yet to log this step's training loss.
            should_log = control.should_log
            self.trainer.log({"eval_loss": loss})
            control.should_log = should_log


class FiniteLoss(TrainerCallback):
    """Raises a ValueError for a non-finite loss or gradient, before a checkpoint is saved."""

    def on_log(self, args: object, state: State, control: Control, logs: Logs = None, **kwargs: object) -> None:
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradients")):
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                found = f"step {state.global_step}: the {what} is {value}, and training ends before that is saved"
                raise ValueError(f"{found}: take a lower --lr or more --warmup, in another --output")


class Bar(ProgressCallback):
    """A progress bar that starts at the resumed step and shows losses instead of printing dictionaries."""

    def on_train_begin(self, args: object, state: State, control: Control, **kwargs: object) -> None:
        """Open the bar at the run's current step."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args: object, state: State, control: Control, logs: Logs = None, **kwargs: object) -> None:
        logs = logs or {}
        shown = {name: f"{float(logs[name]):.3f}" for name in ("loss", "eval_loss") if name in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown, refresh=False)


def train(
    run: Run, make: Callable[[Run, Path], MarkedCheckpoints], folder: RunFolder, checkpoint: str | None, stop: Stop
) -> tuple[list[Json], float]:
    """Train with checkpoints in `folder`, resuming from `checkpoint` if given; `make` creates the trainer.

    Returns:
        The trainer's log history, and the total seconds of training, including earlier starts of the run.
    """
    mark = read_mark(Path(checkpoint)) if checkpoint else None
    # Interrupted after the last step, before the results were saved: only the weights and the log are needed.
    if checkpoint and mark is not None and mark.step >= run.steps:
        run.model.load_adapter(checkpoint, "default", is_trainable=True)
        load_adapters(run, Path(checkpoint))
        return read_json(Path(checkpoint, "trainer_state.json"))["log_history"], mark.seconds
    if run.settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    trainer = make(run, folder.checkpoints)
    trainer.identity = folder.identity
    _put_callbacks(trainer, run, stop)
    for line in (announcement(run), *remarks(run)):
        console.print(line, highlight=False, markup=False)
    if Processes().world_size == 1 and (count := torch.cuda.device_count()) > 1:
        line = f"only one of {count} GPUs is used: torchrun --nproc-per-node {count} -m lorasb finetune ... uses all"
        console.print(line, highlight=False)
    stop.steps = True
    trainer.started = time.perf_counter() - (mark.seconds if mark else 0.0)
    trainer.train(resume_from_checkpoint=checkpoint)
    stop.end()
    return trainer.state.log_history, time.perf_counter() - trainer.started


def run_trainer(run: Run, folder: Path) -> _RunTrainer:
    """Return a trainer for the run's rows."""
    args, optimizer = on_one_device(TrainingArguments(**argument_values(run, folder))), None
    groups = _groups(run, args.weight_decay)
    if groups is not None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind(groups, **options)
    trainer = _RunTrainer(
        model=run.model,
        args=args,
        train_dataset=cast(Dataset, run.rows),
        data_collator=run.collator(),
        optimizers=(optimizer, None),
        callbacks=[AdapterRowsCallback()] if run.adapters else [],
    )
    if isinstance(run.problem, Classification):
        # The forward takes **kwargs but passes none to its loss, a mean over the batch: Trainer has to divide it.
        trainer.model_accepts_loss_kwargs = False
    trainer.run = run
    return trainer


def _groups(run: Run, weight_decay: float) -> list[Json] | None:
    """Return the optimizer's parameter groups; None for the trainer's default."""
    if run.adapters:
        return lorasb.adapter_parameter_groups(run.model, run.adapters, run.lr, weight_decay=weight_decay)
    if run.measures_rate and isinstance(run.problem, Classification):  # the head gets an ordinary rate, not R's
        return lorasb.parameter_groups(run.model, run.lr, other_lr=OTHER_RATE, weight_decay=weight_decay)
    return None


def argument_values(run: Run, folder: Path) -> Json:
    """Return the trainer's arguments by name; GRPO's are based on them, too."""
    settings = run.settings
    micro_batches = settings.gradient_accumulation * Processes().world_size
    if settings.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(settings.output) / "tensorboard"))
    return dict(  # noqa: C408  as they are passed
        output_dir=str(folder),
        per_device_train_batch_size=run.batch_size // micro_batches,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=run.steps,
        learning_rate=run.lr,
        warmup_steps=run.warmup_steps,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,  # True would log NaN as 0
        save_strategy="no",  # `Saving` sets control.should_save
        report_to=settings.report_to,
        remove_unused_columns=False,  # the data set has encoded examples, not columns
        seed=settings.seed,
        use_cpu=device() == "cpu",
        dataloader_pin_memory=device() == "cuda",
        # DDP has to search only with several adapters: one without rows in a batch leaves its R unused
        ddp_find_unused_parameters=bool(run.adapters),
    )


class _RunTrainer(MarkedCheckpoints):
    """A Trainer with `ByLength` order."""

    run: Run

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load R of all adapters at once; their basis was loaded when the run started."""
        if self.run.adapters:
            basis.load_adapters(self.run.model, Path(resume_from_checkpoint), self.run.adapters)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        """Write the adapters; `Trainer` would iterate over all parameters once per adapter."""
        save_adapter(self.run, Path(output_dir or str(self.args.output_dir)))

    def _get_train_sampler(self, train_dataset: object = None) -> ByLength:
        order = self.run.order()
        self.set_epoch = order.set_epoch
        return order


def _put_callbacks(trainer: MarkedCheckpoints, run: Run, stop: Stop) -> None:
    """Replace the trainer's printed logs with a progress bar, and add the run's callbacks."""
    # Trainer adds one of the two.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    planning = [] if run.settings.rl is not None or console.quiet else [Planning(run)]
    every = run.settings.eval_steps
    held_out = [HeldOutLoss(run, trainer, every)] if every else []
    saving = Saving(run.settings.save_steps, stop)
    for callback in (Epochs(trainer), *held_out, FiniteLoss(), Bar(), *planning, saving):
        trainer.add_callback(callback)


def find_rate(run: Run) -> float:
    """Search rates starting at the run's, or refine the measured one; R is left at its start for it. A collective."""
    settings = run.settings
    if settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    search, steps = (find_lr, STEPS) if settings.find_lr else (refine_rate, PROBE_STEPS)
    held = list(itertools.islice(batches(run), JUDGED + steps * settings.gradient_accumulation))
    if len(held) == 1:
        held = split_in_half(held[0])
    found = search(run.model, apart(held), run.lr, accumulation=settings.gradient_accumulation)
    refined = f"learning rate {found.lr:.2g}, from the samples and two trials of {found.steps} steps"
    console.print(str(found) if settings.find_lr else refined, highlight=False, soft_wrap=True)
    return found.lr


def batches(run: Run) -> Iterator[Batch]:
    """Yield this process's batches of the run's first pass, in training order."""
    collate, order, processes = run.collator(), run.order(), Processes()
    count = run.settings.gradient_accumulation * processes.world_size
    size = run.batch_size // count
    for step in order.order(0):
        # if a step has too few rows for every process, those without rows take its first ones
        for start in range(size * processes.rank, len(step), size * processes.world_size) or (0,):
            yield collate([run.rows[i] for i in step[start : start + size]])
