"""Trains a run with `transformers.Trainer`, from the start or from a checkpoint."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from ..compat.transformers import on_one_device
from ..distributed.process_group import Processes
from ..serving import basis_adapters
from ..serving.training import AdapterRowsCallback
from ..training.rate_trials import RateTrials, find_lr, refine_rate
from ..utils.reading import read_json
from . import run_folder
from .estimate import Estimate, announcement, estimate, estimated, memory_in_use, padded_tokens, peak_memory
from .prepare import Run, checkpoint_activations, device, load_adapters, optimizer, save_adapter
from .run_folder import MarkedCheckpoints
from .settings import Settings
from .terminal import Stop, console
from .tokenize import ByLength

MAX_LOST_SECONDS = 600.0  # of training between checkpoints, with --save-steps auto (documented in its help)
TIMED_STEPS = 5  # the first one, which also loads libraries and allocates, is left out where there are others
TIMED_SECONDS = 60.0  # after which fewer steps have to do


class Saving(TrainerCallback):
    """Saves as `--save-steps` asks, at the last step, and when the user stops the run; the same on every rank."""

    def __init__(self, save_steps: str, stop: Stop) -> None:
        self.save_steps = None if save_steps == "auto" else int(save_steps)
        self.stop, self.processes = stop, Processes()
        self.last_saved = self.step_started = time.perf_counter()
        self.longest_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.last_saved = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save and whether to stop."""
        now = time.perf_counter()
        self.longest_step = max(self.longest_step, now - self.step_started)
        if self.save_steps is None:
            # the next step may take as long as the longest, and would be lost too
            due = now - self.last_saved + self.longest_step > MAX_LOST_SECONDS
        else:
            due = state.global_step % self.save_steps == 0
        # Clocks differ between ranks, and saving is collective: if it is due on one rank, all save.
        due = bool(self.processes.all_reduce_max([float(due)])[0])
        stopped = self.stop.agreed(self.processes)
        if due or stopped or state.global_step >= state.max_steps:
            control.should_save, self.last_saved = True, now
        if stopped:  # after a save, so that the run resumes from this very step
            control.should_training_stop = True


class Planning(TrainerCallback):
    """Times the first steps, then prints an estimate of time and memory for the run."""

    def __init__(self, run: Run, order: ByLength, parts: int) -> None:
        self.run, self.order, self.parts = run, order, parts
        self.steps: list[list[int]] = []
        self.times: list[tuple[float, int]] = []
        self.memory_before, self.peak_before, self.started = 0, 0, 0.0
        self.estimate: Estimate | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compute the steps of the first epoch, which stand for those of later epochs; note the memory in use."""
        self.steps = self.order.order(0)
        self.memory_before, self.peak_before = memory_in_use(), peak_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a step's time; after the last timed step, print the estimate."""
        if self.estimate is not None:
            return
        # global_step has been incremented by now, and counts over all epochs
        epoch, number = divmod(state.global_step - 1, len(self.steps))
        rows_of_step = self.order.order(epoch)[number]
        self.times.append((time.perf_counter() - self.started, self._tokens(rows_of_step)))
        remaining_steps = state.max_steps - state.global_step
        timed = sum(seconds for seconds, _ in self.times[1:])
        if len(self.times) < TIMED_STEPS and timed < TIMED_SECONDS and remaining_steps:
            return
        tokens_by_step = [self._tokens(rows) for rows in self.steps]
        tokens = round(sum(tokens_by_step) / len(tokens_by_step) * remaining_steps)
        memory = self.memory_before, peak_memory()
        self.estimate = estimate(self.times, tokens, max(tokens_by_step), memory, self.peak_before)
        if remaining_steps:
            for line in estimated(self.run, self.estimate):
                if not console.quiet:
                    tqdm.write(line)  # print() would break the progress bar

    def _tokens(self, rows: list[int]) -> int:
        return padded_tokens(rows, self.order.lengths, self.parts)


class Judging(TrainerCallback):
    """Logs the held-out loss every `eval_steps` steps."""

    def __init__(self, run: Run, eval_steps: int) -> None:
        self.run, self.eval_steps = run, eval_steps
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate and log, if this step is due."""
        if state.global_step % self.eval_steps == 0:
            # Trainer.log resets should_log, and the Trainer has yet to log this step's training loss.
            should_log = control.should_log
            self.trainer.log({"eval_loss": self.run.held_out_loss()})
            control.should_log = should_log


class Finite(TrainerCallback):
    """Ends training at the first loss or gradient that is not finite, before a checkpoint has it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Raise a ValueError for such a value."""
        for name in ("loss", "grad_norm"):
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                what = "loss" if name == "loss" else "norm of the gradients"
                raise ValueError(
                    f"step {state.global_step}: the {what} is {value}, and "
                    "training ends before that is saved: take a lower --lr or more --warmup, in another --output"
                )


class Ordering(TrainerCallback):
    """Sets the sampler's epoch: on resume, accelerate's loader that skips batches does not pass set_epoch on to it."""

    def __init__(self, order: Any) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Use the order of the epoch that begins."""
        self.order.set_epoch(int(state.epoch or 0))


class Bar(TrainerCallback):
    """A progress bar on rank 0, instead of the dictionaries that Trainer prints at every step."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar at the run's current step."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance by one step."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the losses."""
        if self.bar is not None and logs:
            shown = {name: f"{float(logs[name]):.3f}" for name in ("loss", "eval_loss") if name in logs}
            if shown:
                self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar and leave it on the screen."""
        if self.bar is not None:
            self.bar.close()


STATE_NAME = "trainer_state.json"
Make = Callable[[Run, Path, dict[str, Any], float, Stop], Any]  # as `_trainer`


@dataclass(frozen=True)
class Trained:
    """The trainer's log history, and the seconds of training over all starts of the run."""

    history: list[dict[str, Any]]
    seconds: float


def train(
    run: Run, folder: Path, identity: dict[str, Any], checkpoint: str | None, stop: Stop, make: Make | None = None
) -> Trained:
    """Train with checkpoints in `folder`, resuming from `checkpoint` if given; `make` makes the trainer."""
    mark = run_folder.read_mark(Path(checkpoint)) if checkpoint else None
    # Interrupted after the last step, before the results: only the weights and the log are needed.
    if checkpoint and mark is not None and mark.step >= run.steps:
        return _already_trained(run, Path(checkpoint), mark.seconds)
    trainer = (make or _trainer)(run, folder, identity, mark.seconds if mark else 0.0, stop)
    console.print(announcement(run), highlight=False)
    if Processes().world_size == 1 and torch.cuda.device_count() > 1:
        line = f"one of {torch.cuda.device_count()} GPUs trains: start it by torchrun --nproc-per-node to take more"
        console.print(line, highlight=False)
    stop.steps = True
    trainer.train_started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    stop.end()
    return Trained(trainer.state.log_history, trainer.elapsed())


def _already_trained(run: Run, checkpoint: Path, seconds: float) -> Trained:
    """Load a checkpoint's adapter over the current one, and read its log."""
    run.model.load_adapter(str(checkpoint), "default", is_trainable=True)
    load_adapters(run, checkpoint)
    state = read_json(checkpoint / STATE_NAME)
    return Trained(state["log_history"], seconds)


def _trainer(run: Run, folder: Path, identity: dict[str, Any], earlier_seconds: float, stop: Stop) -> _RunTrainer:
    """A trainer of the run's rows, with its callbacks."""
    settings, processes = run.settings, Processes()
    if settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    args = arguments(run, folder, processes.world_size)
    trainer = _RunTrainer(
        model=run.model,
        args=args,
        train_dataset=cast(Any, run.rows),
        data_collator=run.collator(),
        optimizers=(optimizer(run, args) if run.adapters else None, None),
        callbacks=[AdapterRowsCallback()] if run.adapters else [],
    )
    if run.problem.takes_loss_arguments is not None:
        trainer.model_accepts_loss_kwargs = run.problem.takes_loss_arguments
    trainer.run, trainer.order = run, run.order()
    trainer.identity, trainer.earlier_seconds = identity, earlier_seconds
    _put_callbacks(trainer, run, stop, settings.gradient_accumulation * processes.world_size)
    return trainer


def arguments(run: Run, folder: Path, processes: int) -> TrainingArguments:
    """The trainer's arguments; `callbacks.Saving` decides when to save."""
    return on_one_device(TrainingArguments(**argument_values(run, folder, processes)))


def argument_values(run: Run, folder: Path, processes: int) -> dict[str, Any]:
    """Return the arguments by name, for other trainers' arguments too."""
    settings = run.settings
    micro_batches = settings.gradient_accumulation * processes
    if settings.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(settings.output) / "tensorboard"))
    return dict(  # noqa: C408  as they are passed
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size // micro_batches,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=run.steps,
        learning_rate=run.lr,
        warmup_steps=run.warmup_steps,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # it would log a NaN as 0
        save_strategy="no",  # `callbacks.Saving` sets control.should_save
        report_to=settings.report_to,
        remove_unused_columns=False,  # the data set has encoded examples, not columns
        seed=settings.seed,
        use_cpu=device() == "cpu",
        dataloader_pin_memory=device() == "cuda",
        # every R takes part in every forward, and DDP need not search, but for those of adapters without rows
        ddp_find_unused_parameters=bool(run.adapters),
        disable_tqdm=False,
    )


def check_report(settings: Settings) -> None:
    """Raise an ImportError if the package for `--report-to` is not installed."""
    if settings.report_to != "none" and importlib.util.find_spec(settings.report_to) is None:
        raise ImportError(
            f"--report-to {settings.report_to} needs a package that is not installed: pip install {settings.report_to}"
        )


class _RunTrainer(MarkedCheckpoints, Trainer):
    """A Trainer with `ByLength` order."""

    order: ByLength
    run: Run

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load R's of several adapters at once; the basis is that of the start."""
        if self.run.adapters:
            basis_adapters.load_adapters(self.run.model, Path(resume_from_checkpoint), self.run.adapters)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapters; `Trainer` would go through all parameters once for each of them."""
        save_adapter(self.run, Path(output_dir or str(self.args.output_dir)))

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        return self.order


def _put_callbacks(trainer: _RunTrainer, run: Run, stop: Stop, parts: int) -> None:
    """Replace the Trainer's printing by a progress bar, and add the callbacks of a run."""
    # Trainer adds either of the two, depending on disable_tqdm.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    judging = Judging(run, run.settings.eval_steps) if run.settings.eval_steps else None
    if judging is not None:
        judging.trainer = trainer
        trainer.add_callback(judging)
    for callback in (
        Ordering(trainer.order),
        Bar(),
        Finite(),
        Planning(run, trainer.order, parts),
        Saving(run.settings.save_steps, stop),
    ):
        trainer.add_callback(callback)


def find_rate(run: Run) -> RateTrials:
    """Try rates from the run's on; leaves R at the start that the best one has. A collective: ranks find the same."""
    settings = run.settings
    if settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    found = find_lr(run.model, batches(run), run.lr, accumulation=settings.gradient_accumulation)
    console.print(str(found), highlight=False, soft_wrap=True)
    return found


def refine(run: Run) -> RateTrials:
    """Refine the rate that the initialization has measured; R is left at the start of the result. A collective."""
    if run.settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    found = refine_rate(run.model, batches(run), run.lr, accumulation=run.settings.gradient_accumulation)
    console.print(f"learning rate {found.lr:.2g}, measured on the samples and by two trials of {found.steps} steps")
    return found


def batches(run: Run) -> Iterator[dict[str, Any]]:
    """The run's batches in its order, over and over, in the parts that a step is computed in."""
    settings, collate = run.settings, run.unnamed_collator()
    size = settings.batch_size // settings.gradient_accumulation
    order = run.order()
    for epoch in itertools.count():
        for step in order.order(epoch):
            for start in range(0, len(step), size):
                yield collate([run.rows[i] for i in step[start : start + size]])
