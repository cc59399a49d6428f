"""`--find-lr`: the rate that trials find is trained at, kept with the start, and found again after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from finetune_runs import assert_same, stop_after, summary

from lorasb.app import finetune, train
from lorasb.app.finetune import run_finetune
from lorasb.app.prepare import prepare
from lorasb.app.settings import Settings


@pytest.mark.parametrize("method", ["lora-sb", "lora"])
def test_a_run_trains_at_the_rate_that_it_found(base: Settings, tmp_path: Path, method: str) -> None:
    settings = replace(base, method=method, lr=1e-3, find_lr=True)
    stop_after(4, settings, tmp_path / "stopped")
    start = json.loads((tmp_path / "stopped" / "checkpoints" / "start" / "start.json").read_text())
    assert start["lr"] > 1e-3  # far too low for this task
    with pytest.MonkeyPatch.context() as patch:  # the start is whole: no second trial
        patch.setattr(finetune, "find_rate", lambda run: pytest.fail("tried again"))
        run_finetune(replace(settings, output=str(tmp_path / "stopped")))
    run_finetune(replace(settings, output=str(tmp_path / "whole")))
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert summary(tmp_path / "whole")["lr"] == start["lr"]
    assert summary(tmp_path / "whole")["config"]["lr"] == 1e-3  # so that config.yaml repeats the run


def test_a_rate_that_was_found_is_that_of_a_run_with_it(base: Settings, tmp_path: Path) -> None:
    """R's start is scaled: the run that is told the rate begins at the same start."""
    found = run_finetune(replace(base, lr=1e-3, find_lr=True, output=str(tmp_path / "found"))).summary
    told = run_finetune(replace(base, lr=found["lr"], output=str(tmp_path / "told"))).summary
    assert found["train_losses"] == pytest.approx(told["train_losses"], rel=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_trials_take_the_runs_own_batches(base: Settings, packing: bool) -> None:
    import lorasb

    run = prepare(replace(base, packing=packing, max_length=16, gradient_accumulation=2))
    run.model = lorasb.patch(run.model, r=4)
    batches = train.batches(run)
    first = [next(batches) for _ in range(40)]  # more than an epoch
    assert max(len(batch["input_ids"]) for batch in first) == base.batch_size // 2
    assert ("attention_mask" not in first[0]) == packing  # packs are told apart by their positions
