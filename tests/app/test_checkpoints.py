"""A run's checkpoints: which one a run goes on from, those that were cut off, those of another run, and a full disk."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import assert_same, stop_after
from transformers import Trainer

from lorasb.app import run_folder
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(base: Settings, tmp_path: Path) -> None:
    stop_after(4, base, tmp_path / "a")
    foreign = tmp_path / "a" / "checkpoints" / "checkpoint-3"
    other = replace(base, lr=1e-3, output=str(tmp_path / "b"), resume=str(foreign))
    with pytest.raises(
        ValueError, match=r"checkpoint-3: this checkpoint is of another run: --lr was 0.005 and is 0.001"
    ):
        run_finetune(other)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (False, "--resume is auto, never or the folder of a checkpoint, and there is none at"),
        (True, "this is no whole checkpoint"),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_is_refused(
    base: Settings, tmp_path: Path, made: bool, message: str
) -> None:
    folder = tmp_path / "checkpoint-3"
    if made:
        folder.mkdir()
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(base, output=str(tmp_path / "run"), resume=str(folder)))


def test_a_run_goes_on_from_the_checkpoint_that_is_named(base: Settings, whole: Path, tmp_path: Path) -> None:
    stop_after(7, base, tmp_path)
    chosen = tmp_path / "checkpoints" / "checkpoint-6"
    run_finetune(replace(base, output=str(tmp_path), resume=str(chosen)))
    assert_same(tmp_path, whole)


CUT_OFF = "checkpoint-7 was cut off while it was written, and is left out"
DAMAGED = r"checkpoint-7 is damaged \({} is not what was written\), and is left out"
SAID = {
    "mark": CUT_OFF,
    "truncated": DAMAGED.format("optimizer.pt"),
    "missing": r"checkpoint-7 is incomplete \(adapter_model.safetensors is missing\), and is left out",
    "adapter_model.safetensors": DAMAGED.format("adapter_model.safetensors"),
    "optimizer.pt": DAMAGED.format("optimizer.pt"),
    "trainer_state.json": DAMAGED.format("trainer_state.json"),
}


def flip_a_bit(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 1
    file.unlink()  # not through a hard link
    file.write_bytes(damaged)


@pytest.mark.parametrize("damage", SAID)
def test_a_half_written_checkpoint_is_left_out(
    base: Settings, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    stop_after(7, base, tmp_path)
    last = tmp_path / "checkpoints" / "checkpoint-7"
    if damage == "mark":
        (last / run_folder.MARK).unlink()
    elif damage == "truncated":
        file = last / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        (last / "adapter_model.safetensors").unlink()
    else:
        flip_a_bit(last / damage)
    with pytest.raises(ValueError, match="this is no whole checkpoint of lorasb finetune"):
        run_finetune(replace(base, output=str(tmp_path), resume=str(last)))
    run_finetune(replace(base, output=str(tmp_path)))
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(SAID[damage], said)
    assert "step 6" in said
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("damaged", ["start", "factors of both"])
def test_damage_that_all_checkpoints_share_is_found_too(
    base: Settings, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    stop_after(7, base, tmp_path)
    folder = tmp_path / "checkpoints"
    if damaged == "start":
        flip_a_bit(folder / "start" / "adapter_model.safetensors")
        (folder / "checkpoint-7" / "optimizer.pt").unlink()
    else:
        for name in ("checkpoint-6", "checkpoint-7"):
            flip_a_bit(folder / name / "lorasb_factors.safetensors")
    run_finetune(replace(base, output=str(tmp_path)))
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged (" in said
    assert ("step 6" if damaged == "start" else "before its first checkpoint") in said
    assert_same(tmp_path, whole)


def test_nothing_is_unpickled_that_is_not_what_was_written(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(4, base, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("*.p*"):
        flip_a_bit(file)
    monkeypatch.setattr(torch, "load", lambda *given, **named: pytest.fail("a damaged file is unpickled"))
    run_finetune(replace(base, output=str(tmp_path)))


@pytest.mark.parametrize("where", ["trainer", "factors", "mark"])
def test_a_full_disk_is_one_error_and_loses_nothing(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*given: Any, **named: Any) -> None:
        if where == "trainer":  # as torch and safetensors say it
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device")
        raise OSError(errno.ENOSPC, "No space left on device")

    stop_after(4, base, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        if where == "trainer":
            patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        elif where == "factors":
            patch.setattr(run_folder, "share", full)
        else:
            patch.setattr(run_folder, "mark_complete", full)
        with pytest.raises(
            OSError,
            match=r"checkpoint-6 cannot be written: .*No space left.*Those before it are whole: make room and start the same command again",
        ):
            run_finetune(replace(base, output=str(tmp_path)))
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    run_finetune(replace(base, output=str(tmp_path)))
    assert_same(tmp_path, whole)
