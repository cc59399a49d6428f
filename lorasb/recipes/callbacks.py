"""Trainer callbacks of a run: when to save and stop, time estimate, held-out loss, row order, progress bar."""

from __future__ import annotations

import math
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..distributed.process_group import Processes
from .console import console
from .estimate import Estimate, estimate, estimated, memory_in_use, padded_tokens, peak_memory
from .examples.batch_order import ByLength
from .prepare import Run
from .signals import Stop

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
