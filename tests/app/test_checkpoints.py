"""A run's checkpoints and results: when they are saved, which one a run resumes from, damaged ones, and a full disk."""

from __future__ import annotations

import errno
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from finetune_runs import STEPS, assert_same
from transformers import Trainer, TrainingArguments

from lorasb.app import finetune, results, run_folder, settings, train
from lorasb.app.finetune import run_finetune
from lorasb.app.run_folder import RunFolder
from lorasb.app.settings import Settings
from lorasb.utils import plotting


@pytest.fixture
def cut(stopped: dict[int, Path], tmp_path: Path) -> Path:
    """The checkpoints of a run that was interrupted after step 7."""
    return Path(shutil.copytree(stopped[7], tmp_path, dirs_exist_ok=True)) / "checkpoints"


def said_of(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_auto_saves_before_more_than_ten_minutes_are_lost(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 100))  # each look at it is 100 s after the one before: two looks a step
    saved: list[float] = []
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    keep = run_folder.mark_complete
    marked = lambda folder, *rest: saved.append(run_folder.step_of(folder)) or keep(folder, *rest)  # noqa: E731
    monkeypatch.setattr(run_folder, "mark_complete", marked)
    run_finetune(replace(base, output=str(tmp_path), save_steps="auto"))
    assert saved[-1] == STEPS
    assert 2 < len(saved) < STEPS


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(base: Settings, cut: Path, tmp_path: Path) -> None:
    other = replace(base, lr=1e-3, output=str(tmp_path / "b"), resume=str(cut / "checkpoint-6"))
    message = r"checkpoint-6: this checkpoint is of another run: --lr was 0.005 and is 0.001"
    with pytest.raises(ValueError, match=message):
        run_finetune(other)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (False, "--resume is auto, never or the folder of a checkpoint, and there is none at"),
        (True, "this is no whole checkpoint"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(base: Settings, tmp_path: Path, made: bool, message: str) -> None:
    folder = tmp_path / "checkpoint-3"
    if made:
        folder.mkdir()
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(base, output=str(tmp_path / "run"), resume=str(folder)))


def test_a_run_goes_on_from_the_checkpoint_that_is_named(base: Settings, whole: Path, cut: Path) -> None:
    run_finetune(replace(base, output=str(cut.parent), resume=str(cut / "checkpoint-6")))
    assert_same(cut.parent, whole)


DAMAGED = r"checkpoint-7 is damaged \({} is not what was written\), and is left out"
SAID = {
    "mark": "checkpoint-7 was cut off while it was written, and is left out",
    "truncated": DAMAGED.format("optimizer.pt"),
    "missing": r"checkpoint-7 is incomplete \(adapter_model.safetensors is missing\), and is left out",
    **{name: DAMAGED.format(name) for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")},
}


def flip_a_bit(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 1
    file.write_bytes(damaged)


@pytest.mark.parametrize("damage", SAID)
def test_a_half_written_checkpoint_is_left_out(base: Settings, cut: Path, damage: str) -> None:
    last, settings = cut / "checkpoint-7", replace(base, output=str(cut.parent))
    identity = run_folder.read_mark(last).identity
    if damage == "mark":
        (last / run_folder.MARK).unlink()
    elif damage == "truncated":
        (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-1])
    elif damage == "missing":
        (last / "adapter_model.safetensors").unlink()
    else:
        flip_a_bit(last / damage)
    with pytest.raises(ValueError, match="this is no whole checkpoint of lorasb finetune"):
        run_finetune(replace(settings, resume=str(last)))
    found = RunFolder(settings, identity).look()
    assert found.checkpoint == str(cut / "checkpoint-6")
    assert found.left_out == [str(last)]
    assert re.search(SAID[damage], found.lines[0])


@pytest.mark.parametrize("damaged", ["last", "start", "factors of both"])
def test_damage_is_found_and_loses_no_more_than_it_has_to(
    base: Settings, whole: Path, cut: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    if damaged == "factors of both":
        for name in ("checkpoint-6", "checkpoint-7"):
            flip_a_bit(cut / name / "lorasb_factors.safetensors")
    else:
        (cut / "checkpoint-7" / "optimizer.pt").unlink()
    if damaged == "start":
        flip_a_bit(cut / "start" / "adapter_model.safetensors")
    run_finetune(replace(base, output=str(cut.parent)))
    said = said_of(capsys)
    assert ("damaged (" in said) == (damaged != "last")
    assert ("before its first checkpoint" if damaged == "factors of both" else "step 6") in said
    assert_same(cut.parent, whole)


def test_nothing_is_unpickled_that_is_not_what_was_written(
    base: Settings, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in cut.rglob("*.p*"):
        flip_a_bit(file)
    monkeypatch.setattr(torch, "load", lambda *given, **named: pytest.fail("a damaged file is unpickled"))
    run_finetune(replace(base, output=str(cut.parent)))


PLACES = {
    "trainer": (Trainer, "_save_optimizer_and_scheduler", RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device")),
    "factors": (run_folder, "share", OSError(errno.ENOSPC, "No space left on device")),
    "mark": (run_folder, "mark_complete", OSError(errno.ENOSPC, "No space left on device")),
}  # fmt: skip


def failing(error: Exception) -> Any:
    def fail(*given: Any, **named: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", PLACES)
def test_a_full_disk_is_one_error_and_loses_nothing(
    base: Settings, whole: Path, cut: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    owner, name, error = PLACES[where]
    settings = replace(base, output=str(cut.parent))
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    message = r"checkpoint-9 cannot be written: .*No space left.*Those before it are whole: make room and start the same command again"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        with pytest.raises(OSError, match=message):
            run_finetune(settings)
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before
    run_finetune(settings)
    assert_same(cut.parent, whole)


def test_a_full_disk_at_the_results_loses_no_training(
    base: Settings, whole: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(base, output=str(cut.parent))
    error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr("lorasb.export.lora.export_lora", failing(error))
        with pytest.raises(OSError, match=r"lora cannot be written: .*No space left"):
            run_finetune(settings)
    monkeypatch.setattr(Trainer, "train", lambda *given, **named: pytest.fail("nothing is trained twice"))
    run_finetune(settings)
    assert_same(cut.parent, whole)
    assert results.load(cut.parent).summary["train_losses"]


def test_results_that_cannot_be_written_leave_the_former_ones(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in (output / "lora").iterdir()}
    monkeypatch.setattr("lorasb.export.lora.export_lora", failing(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        run_finetune(replace(base, output=str(output), seed=1, epochs=0.2, resume="never"))
    assert {path.name: path.read_bytes() for path in (output / "former" / "lora").iterdir()} == before
    assert (output / "former" / "energy.png").is_file()


def test_without_matplotlib_a_run_has_no_pictures(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plotting, "installed", lambda: False)
    run_finetune(replace(base, output=str(tmp_path), epochs=0.2))
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".json", ".yaml"}
    assert "no pictures, as matplotlib is not installed" in said_of(capsys)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_report_to_a_missing_package_is_refused_before_any_work(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finetune, "load_examples", lambda *given: pytest.fail("it is noticed before any work"))
    message = f"--report-to {name} needs a package that is not installed: pip install {name}"
    with pytest.raises(ImportError, match=message):
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
