"""Ctrl-C and SIGTERM: a run saves and stops after its step, at once when asked again, and the command ends in one line."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import At, add, assert_same, stop_after

from lorasb.app import cli, finetune, run_folder
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings
from lorasb.app.terminal import StoppedError


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_saves_and_going_on_ends_in_the_same_bits(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = stop_after(5, base, tmp_path, number)
    assert stopped.code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    steps = sorted(map(run_folder.step_of, run_folder.complete_checkpoints(tmp_path / "checkpoints")))
    assert steps == [3, 5]

    def again(*given: Any, **named: Any) -> Any:
        raise AssertionError("nothing is initialized or evaluated twice")

    monkeypatch.setattr(finetune, "adapt", again)
    titles = []
    evaluate = finetune.Run.evaluate
    monkeypatch.setattr(finetune.Run, "evaluate", lambda run, title: titles.append(title) or evaluate(run, title))
    run_finetune(replace(base, output=str(tmp_path)))
    assert titles == ["held-out problems, after"]
    assert_same(tmp_path, whole)


def test_a_second_ctrl_c_ends_at_once(base: Settings, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        add(patch, At(4, twice))
        with pytest.raises(StoppedError):
            run_finetune(replace(base, output=str(tmp_path)))
    assert [run_folder.step_of(one) for one in run_folder.complete_checkpoints(tmp_path / "checkpoints")] == [3]


def test_ctrl_c_before_training_ends_at_once(base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "prepare", lambda *given: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError):
        run_finetune(replace(base, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*given: Any) -> None:
        raise StoppedError(signal.SIGTERM, finetune.GO_ON)

    monkeypatch.setattr(finetune, "run_finetune", stopped)
    monkeypatch.setattr(sys, "argv", ["lorasb", "finetune"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 143
    assert capsys.readouterr().err.strip() == "lorasb: stopped: rerun the same command to resume"
