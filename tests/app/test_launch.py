"""Runs that a launcher starts: two processes do what one does, and launches that cannot work are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_runs import on_two_processes, summary

from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


@pytest.mark.long
def test_two_processes_train_what_one_does(tiny: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """The same command under torchrun: the same samples, steps and losses; only rank 0 prints and writes."""
    done = on_two_processes({"--model": tiny, "--data": data, "--output": tmp_path})
    assert done.stdout.count("exact answers") == done.stdout.count("computed in") == 1
    ours, alone = summary(tmp_path), summary(whole)
    assert ours["identity"]["processes"] == 2
    assert ours["train_losses"] == pytest.approx(alone["train_losses"], rel=0.05)
    assert ours["eval_loss_before"] == pytest.approx(alone["eval_loss_before"], rel=1e-5)
    assert ours["train_losses"][0] == pytest.approx(alone["train_losses"][0], rel=1e-4)


def test_a_launch_that_shards_the_model_is_refused(base: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="this launch asks for FSDP: write a script with Trainer"):
        run_finetune(base)
