"""When a run saves by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from finetune_runs import STEPS

from lorasb.app import run_folder, train
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


def test_auto_saves_before_more_than_ten_minutes_are_lost(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 100))  # each look at it is 100 s after the one before: two looks a step
    saved: list[float] = []
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    keep = run_folder.mark_complete
    monkeypatch.setattr(
        run_folder,
        "mark_complete",
        lambda folder, *rest: saved.append(run_folder.step_of(folder)) or keep(folder, *rest),
    )
    run_finetune(replace(base, output=str(tmp_path), save_steps="auto"))
    assert saved[-1] == STEPS
    assert 2 < len(saved) < STEPS
