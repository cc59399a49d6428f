"""What is checked of a run's training before any work, and on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from lorasb.app import finetune, run_folder, train
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


def test_a_report_to_a_missing_package_is_refused_before_any_work(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finetune, "load_examples", lambda *given: pytest.fail("it is noticed before any work"))
    for name in ("wandb", "tensorboard"):
        with pytest.raises(
            ImportError, match=f"--report-to {name} needs a package that is not installed: pip install {name}"
        ):
            run_finetune(replace(base, report_to=name, output=str(tmp_path)))


def test_a_loss_that_is_not_finite_ends_training_before_it_is_saved(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = train._RunTrainer.compute_loss, []

    def broken(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return compute(trainer, *args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(train._RunTrainer, "compute_loss", broken)
    with pytest.raises(ValueError, match=r"step 3: the loss is nan, and training ends before that is saved"):
        run_finetune(replace(base, output=str(tmp_path), save_steps="1"))
    assert sorted(map(run_folder.step_of, run_folder.complete_checkpoints(tmp_path / "checkpoints"))) == [1, 2]


def test_a_process_trains_on_one_gpu(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
    assert args.n_gpu <= 1
    args._n_gpu = 2  # as Trainer finds it beside two cards without a launcher
    assert args.train_batch_size == 8
    assert train.on_one_device(args).train_batch_size == 4
