"""Whose a run's folder is: a finished run is not done again, and other settings are refused by name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from finetune_runs import assert_same, stop_after
from tiny_run import WORDS

from lorasb.app import finetune, run_folder
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings, read_config
from lorasb.utils.atomic_files import locked


def test_a_finished_run_gives_its_results_again(
    base: Settings, whole: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "prepare", lambda *given: pytest.fail("nothing is loaded"))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    found = run_finetune(replace(base, output=str(whole), save_steps="5"))  # which changes no result
    assert found.summary == json.loads((whole / "summary.json").read_text())
    assert found.report is not None
    assert found.report.num_samples == 8
    assert len(found.before.answers) == len(found.after.answers) == len(found.examples) == 3
    assert "is finished: these are its results" in said()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_other_settings_are_refused_by_name(base: Settings, whole: Path) -> None:
    other = replace(base, output=str(whole), lr=1e-3, rank_pattern={"q_proj": 4})
    message = r"has a run with other settings: --rank-pattern was None and is .*, --lr was 0.005 and is 0.001\. Take another --output, or --resume never"
    with pytest.raises(ValueError, match=message):
        run_finetune(other)


@pytest.mark.parametrize(
    ("identity", "seed", "message"),
    [
        (lambda found: found, 1, "other settings: --seed was 0 and is 1"),
        (lambda found: "{", 0, r"run\.json cannot be read, and says whose checkpoints lie there"),
        (lambda found: {name: value for name, value in found.items() if name != "template"}, 0, "an earlier version of lorasb made it, without --template"),
    ],
    ids=["other settings", "unreadable", "an earlier version"],
)  # fmt: skip
def test_another_run_is_refused_and_clears_nothing(cut: Settings, identity: Any, seed: int, message: str) -> None:
    file = Path(cut.output) / "checkpoints" / "run.json"
    found = identity(json.loads(file.read_text()))
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(cut, seed=seed))
    assert len(run_folder.complete_checkpoints(file.parent)) == 2


def test_other_examples_in_the_same_file_are_refused(base: Settings, data: Path, tmp_path: Path) -> None:
    file, settings = Path(shutil.copy(data, tmp_path / "data.jsonl")), replace(base, output=str(tmp_path / "run"))
    stop_after(1, replace(settings, data=str(file)), tmp_path / "run")
    file.write_text(file.read_text() + json.dumps({"prompt": "one more", "completion": WORDS[0]}) + "\n")
    with pytest.raises(ValueError, match="other settings: the examples themselves have changed"):
        run_finetune(replace(settings, data=str(file)))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_checkpoints_of_another_program_are_left_alone(own: Settings, tmp_path: Path, resume: str) -> None:
    foreign = tmp_path / "checkpoints" / "checkpoint-500" / "model.pt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("weights")
    with pytest.raises(ValueError, match=r"checkpoint-500 is not of lorasb finetune, which clears .*another --output"):
        run_finetune(replace(own, resume=resume))
    assert foreign.read_text() == "weights"


def test_a_run_is_repeated_to_the_bit_from_its_config(base: Settings, whole: Path, tmp_path: Path) -> None:
    values = read_config(whole / "config.yaml")
    values["output"] = str(tmp_path)
    run_finetune(Settings(**values))
    assert_same(tmp_path, whole)
    run_finetune(Settings(**values | {"seed": 1, "resume": "never"}))
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() != (whole / weights).read_bytes()


def test_a_folder_in_use_is_refused_by_the_pid_that_has_it(own: Settings, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(write_end, b"held")
            signal.pause()
    assert os.read(read_end, 4) == b"held"
    try:
        for resume in ("auto", "never"):
            with pytest.raises(ValueError, match=rf"is in use by PID {child}: wait for it to end, or take another"):
                run_finetune(replace(own, resume=resume))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path):  # a killed process holds nothing
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("taken", [False, True])
def test_resume_never_sets_the_former_results_aside_before_it_starts(
    own: Settings, whole: Path, tmp_path: Path, said: Callable[[], str], taken: bool
) -> None:
    """And removes none that were set aside before, nor a folder or a file of the user's of that name."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    if taken:
        (tmp_path / "former").mkdir()
        (tmp_path / "former" / "thesis.txt").write_text("mine")
    again = replace(own, lr=1e-3, resume="never")
    stop_after(2, again, tmp_path)
    assert "are moved to" in said()
    if taken:
        stop_after(1, replace(again, lr=2e-3), tmp_path)  # which has none to move
        assert (tmp_path / "former" / "thesis.txt").read_text() == "mine"
    steps = [run_folder.step_of(one) for one in run_folder.complete_checkpoints(tmp_path / "checkpoints")]
    assert steps == ([1] if taken else [2])
    formers = {"former", "former-2"} if taken else {"former"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "config.yaml", "notes.txt"} | formers
    for name in ("answers.json", "energy.png", "lora/adapter_model.safetensors"):
        assert (tmp_path / max(formers) / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("builtins.open", PermissionError("read-only file system")),
        ("fcntl.flock", OSError(errno.ENOLCK, "no locks")),
        ("fcntl.flock", OSError(errno.ENOTSUP, "no locks")),
    ],
)
def test_a_folder_that_cannot_be_locked_holds_nobody_up(
    whole: Path, name: str, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, Mock(side_effect=error))
    with locked(whole):
        monkeypatch.undo()


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking another process ended, and removed the file."""
    flock, calls = fcntl.flock, []

    def late(lock: Any, flags: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(1)
        flock(lock, flags)

    monkeypatch.setattr("fcntl.flock", late)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
