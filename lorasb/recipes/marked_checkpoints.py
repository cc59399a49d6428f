"""Checkpoints of a run's trainer: A and B shared, marked when they are whole, removed when they are not."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from ..checkpoints.shared_factors import share
from ..distributed.process_group import Processes
from . import checkpoints


class MarkedCheckpoints:
    """To be inherited before a Trainer.

    Attributes:
        identity: of the run.
        earlier_seconds: seconds of training in earlier starts of the run.
        train_started: `time.perf_counter()` when this start's training began.
    """

    identity: dict[str, Any]
    earlier_seconds: float
    train_started: float
    args: Any
    state: Any

    def elapsed(self) -> float:
        """Seconds of training so far, over all starts."""
        return self.earlier_seconds + time.perf_counter() - self.train_started

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        writes, error = self.args.should_save, None
        if writes:
            # The folder is written again after a resume from before it: it must not count as complete meanwhile.
            (folder / checkpoints.MARK).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except Exception as caught:  # a full disk: torch and safetensors raise types of their own
            error = caught
        try:
            # The error is raised on every rank: the others would wait forever in the next collective.
            Processes().raise_on_every_rank(error, "saving a checkpoint")
            if writes:
                share(folder)  # before the mark, which lists the files and their sizes
                checkpoints.complete(folder, self.elapsed(), self.identity)
        except Exception as caught:
            if writes:
                shutil.rmtree(folder, ignore_errors=True)
            raise _cannot_be_written(folder, caught) from caught


def _cannot_be_written(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"the checkpoint {folder} cannot be written: {' '.join(str(error).split())}. Those before it are "
        "whole: make room and start the same command again"
    )
