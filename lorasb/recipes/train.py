"""Trains a run with `transformers.Trainer`, from the start or from a checkpoint."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from ..distributed.process_group import Processes
from ..training.rows_callback import AdapterRowsCallback
from ..utils.reading import read_json
from . import checkpoints
from .callbacks import Bar, Finite, Judging, Ordering, Planning, Saving
from .console import console
from .estimate import announcement
from .examples.batch_order import ByLength
from .examples.data import Listed
from .marked_checkpoints import MarkedCheckpoints
from .prepare import Run, checkpoint_activations, device
from .settings import Settings
from .signals import Stop
from .user_adapters import load_adapters, optimizer

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
    """Train with checkpoints in `folder`, resuming from `checkpoint` if given; `make` makes the trainer.

    Raises:
        StoppedError: the user stopped the run; a checkpoint was written.
        OSError: a checkpoint cannot be written; earlier ones are complete.
    """
    mark = checkpoints.read(Path(checkpoint)) if checkpoint else None
    # Interrupted after the last step, before the results: only the weights and the log are needed.
    if checkpoint and mark is not None and mark.step >= run.steps:
        return _already_trained(run, Path(checkpoint), mark.seconds)
    trainer = (make or _trainer)(run, folder, identity, mark.seconds if mark else 0.0, stop)
    console.print(announcement(run), highlight=False)
    if Processes().world_size == 1 and torch.cuda.device_count() > 1:
        told = f"one of {torch.cuda.device_count()} GPUs trains: start it by torchrun --nproc-per-node to take more"
        console.print(told, highlight=False)
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
        train_dataset=Listed(run.rows),
        data_collator=run.collator(),
        optimizers=(optimizer(run, args) if run.adapters else None, None),
        callbacks=[AdapterRowsCallback()] if run.adapters else [],
    )
    if run.problem.takes_loss_arguments is not None:
        trainer.model_accepts_loss_kwargs = run.problem.takes_loss_arguments
    trainer.order, trainer.identity, trainer.earlier_seconds = run.order(), identity, earlier_seconds
    _put_callbacks(trainer, run, stop, settings.gradient_accumulation * processes.world_size)
    return trainer


def arguments(run: Run, folder: Path, processes: int) -> TrainingArguments:
    """The trainer's arguments; `callbacks.Saving` decides when to save."""
    return on_one_device(TrainingArguments(**argument_values(run, folder, processes)))


def on_one_device(args: Any) -> Any:
    """The arguments of a process that trains on one GPU. Without a launcher Trainer would take all of them by
    DataParallel, with as many times the examples a step."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def argument_values(run: Run, folder: Path, processes: int) -> dict[str, Any]:
    """The same by name, for other trainers' arguments too."""
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
