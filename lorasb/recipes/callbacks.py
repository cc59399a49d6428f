"""Callbacks around a run's steps: when it saves and stops, what it says of itself, and its progress bar."""

from __future__ import annotations

import time
from typing import Any

import psutil
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..distributed.process_group import Processes
from .batch_order import ByLength
from .console import console
from .estimate import Estimate, estimate, estimated, padded_tokens, peak_memory
from .prepare import Run
from .signals import Stop

LOST = 600.0  # seconds of training that may be lost at most, with --save-steps auto
TIMED = 2  # steps


class Saving(TrainerCallback):
    """Saves as often as `--save-steps` asks, at the last step, and where the user ends the run; all processes alike."""

    def __init__(self, save_steps: str, stop: Stop) -> None:
        self.every = None if save_steps == "auto" else int(save_steps)
        self.stop, self.processes = stop, Processes()
        self.saved = self.begun = time.perf_counter()
        self.longest = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self.saved = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, now that a step is done."""
        now = time.perf_counter()
        self.longest = max(self.longest, now - self.begun)
        due = now - self.saved + self.longest > LOST if self.every is None else state.global_step % self.every == 0
        due = bool(self.processes.all_reduce_max([float(due)])[0])
        stopped = self.stop.agreed(self.processes)
        if due or stopped or state.global_step >= state.max_steps:
            control.should_save, self.saved = True, now
        if stopped:
            control.should_training_stop = True


class Planning(TrainerCallback):
    """Times the first steps, and says then how long the rest takes."""

    def __init__(self, run: Run, order: ByLength, parts: int) -> None:
        self.run, self.order, self.parts = run, order, parts
        self.steps: list[list[int]] = []
        self.times: list[tuple[float, int]] = []
        self.before, self.begun = 0, 0.0
        self.estimate: Estimate | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay out the steps of an epoch: those of the others are about as long."""
        self.steps = self.order.order(0)
        self.before = min(psutil.Process().memory_info().rss, peak_memory())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a timed step; after the last of them the estimate is said."""
        if self.estimate is not None:
            return
        epoch, number = divmod(state.global_step - 1, len(self.steps))
        done = self.order.order(epoch)[number]
        self.times.append((time.perf_counter() - self.begun, self._tokens(done)))
        left = state.max_steps - state.global_step
        if len(self.times) < TIMED and left:
            return
        every = [self._tokens(rows) for rows in self.steps]
        tokens = round(sum(every) / len(every) * left)
        self.estimate = estimate(self.times, tokens, max(every), (self.before, peak_memory()))
        if left:
            for line in estimated(self.run, self.estimate):
                if not console.quiet:
                    tqdm.write(line)

    def _tokens(self, rows: list[int]) -> int:
        return padded_tokens(rows, self.order.lengths, self.parts)


class Judging(TrainerCallback):
    """Takes the held-out loss every so many steps, into the trainer's log."""

    def __init__(self, run: Run, every: int) -> None:
        self.run, self.every = run, every
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where it is time to."""
        if state.global_step % self.every == 0:
            wanted = control.should_log  # logging takes it back, and the step's own loss is still to come
            self.trainer.log({"eval_loss": self.run.held_out_loss()})
            control.should_log = wanted


class Ordering(TrainerCallback):
    """Gives every epoch its order: accelerate's loaders do not reach the sampler where steps are skipped."""

    def __init__(self, order: ByLength) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the order of the epoch that begins."""
        self.order.set_epoch(int(state.epoch or 0))


class Bar(TrainerCallback):
    """The progress bar of the first process, in place of the dictionaries that Trainer prints at every step."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin where the run is."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One more."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the losses."""
        if self.bar is not None and logs:
            shown = {name: f"{float(logs[name]):.3f}" for name in ("loss", "eval_loss") if name in logs}
            if shown:
                self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar where it ended."""
        if self.bar is not None:
            self.bar.close()
