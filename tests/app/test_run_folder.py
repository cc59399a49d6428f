"""A run's folder: which run owns it, the checkpoint and results to resume from, damage, a full disk and the lock."""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors
import torch
from finetune_runs import STEPS, assert_same, stop_after
from tiny_run import WORDS
from transformers import AutoTokenizer, Trainer, TrainingArguments

from lorasb.app import finetune, results, run_folder, settings, train
from lorasb.app.finetune import run_finetune
from lorasb.app.run_folder import NEW, RunFolder, State
from lorasb.app.settings import Settings, read_config
from lorasb.utils import plotting
from lorasb.utils.atomic_files import locked

pytestmark = pytest.mark.usefixtures("blank_pictures")


def test_a_finished_run_gives_its_results_again(
    base: Settings, whole: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "prepare", lambda *given: pytest.fail("the model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    found = run_finetune(replace(base, output=str(whole), save_steps="5"))  # save_steps changes no result
    assert found.summary == json.loads((whole / "summary.json").read_text())
    assert found.report is not None
    assert found.report.num_samples == 8
    assert len(found.before.answers) == len(found.after.answers) == len(found.examples) == 3
    assert "is finished: these are its results" in said()
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_other_settings_are_refused_by_name(base: Settings, whole: Path) -> None:
    other = replace(base, output=str(whole), lr=1e-3, rank_pattern={"q_proj": 4})
    message = r"has a run with other settings: --rank-pattern was not given and is .*, --lr was 0.005 and is 0.001\. Take another --output, or --resume never"
    with pytest.raises(ValueError, match=message):
        run_finetune(other)


@pytest.mark.parametrize(
    ("identity", "seed", "message"),
    [
        (lambda found: found, 1, "other settings: --seed was 0 and is 1"),
        (lambda found: "{", 0, r"run\.json, which identifies the run of these checkpoints, cannot be read"),
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


def test_a_run_that_never_started_does_not_keep_its_folder(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "adapt", Mock(side_effect=ValueError("refused")))
    with pytest.raises(ValueError, match="refused"):
        run_finetune(own)
    for seed, state in ((0, run_folder.UNFINISHED), (1, run_folder.NEW)):
        identity = json.loads(Path(own.output, "checkpoints", "run.json").read_text()) | {"seed": seed}
        assert RunFolder(replace(own, seed=seed), identity).look().kind == state


def test_a_rank_too_large_is_refused_before_anything_is_computed(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasb.app.prepare.Run.evaluate", lambda *given: pytest.fail("the model was evaluated"))
    with pytest.raises(ValueError, match=r"rank 250 is more than layer .* allows"):
        run_finetune(replace(own, r=250))
    assert not Path(own.output, "config.yaml").exists()


def test_other_examples_in_the_same_file_are_refused(base: Settings, data: Path, tmp_path: Path) -> None:
    file, settings = Path(shutil.copy(data, tmp_path / "data.jsonl")), replace(base, output=str(tmp_path / "run"))
    stop_after(1, replace(settings, data=str(file)), tmp_path / "run")
    file.write_text(file.read_text() + json.dumps({"prompt": "one more", "completion": WORDS[0]}) + "\n")
    with pytest.raises(
        ValueError, match="other settings: the examples, or what this version holds out of them, have changed"
    ):
        run_finetune(replace(settings, data=str(file)))


def test_a_run_is_not_resumed_with_another_chat_template(base: Settings, tiny: Path, tmp_path: Path) -> None:
    model, run = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "run"
    settings = replace(base, model=str(model), output=str(run), template="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for i, role in enumerate(("'red'", "'two'")):
        tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {role} }}}} {{{{ m['content'] }}}} {{% endfor %}}"
        tokenizer.save_pretrained(model)
        if i == 0:
            stop_after(3, settings, run)
    with pytest.raises(ValueError, match="or its chat template tokenizes the examples differently than when this"):
        run_finetune(settings)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_checkpoints_of_another_program_are_left_alone(own: Settings, tmp_path: Path, resume: str) -> None:
    foreign = tmp_path / "checkpoints" / "checkpoint-500" / "model.pt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("weights")
    with pytest.raises(
        ValueError, match=r"checkpoint-500 was not written by lorasb finetune, which removes .*another --output"
    ):
        run_finetune(replace(own, resume=resume))
    assert foreign.read_text() == "weights"


def test_configs_of_the_users_are_kept(own: Settings) -> None:
    folder = RunFolder(own, {})
    for text, kept in (("lr: 0.002  # mine\n", "former-config.yaml"), ("lr: 1\n", "former-config-2.yaml")):
        folder.folder.mkdir(exist_ok=True)
        (folder.folder / "config.yaml").write_text(text)
        folder.begin(State(NEW))
        folder.end()  # or the folder would have a run
        assert (folder.folder / kept).read_text() == text
    assert read_config(folder.folder / "config.yaml")["r"] == own.r


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_does_not_move_its_own_basis(own: Settings, resume: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    own = replace(own, basis=str(tmp_path / "adapter"), resume=resume)
    with pytest.raises(ValueError, match=r"expected a --basis outside of the results in .* take another --output"):
        RunFolder(own, {}).look()
    assert RunFolder(replace(own, basis=str(tmp_path / "basis")), {}).look().kind == NEW


def test_a_mark_that_cannot_be_read_now_loses_no_checkpoint(cut: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == run_folder.MARK:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(OSError, match="Input/output"):
        run_finetune(cut)
    monkeypatch.undo()
    assert len(run_folder.complete_checkpoints(Path(cut.output) / "checkpoints")) == 2


def test_folders_of_the_users_with_the_names_of_results_are_set_aside(own: Settings, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    folder = RunFolder(own, {})
    state = folder.look()
    assert state == State(NEW, None, [f"the earlier results in {tmp_path} are moved to {tmp_path / 'former'}"])
    folder.begin(state)
    assert (tmp_path / "former" / "adapter" / "mine.txt").read_text() == "mine"


def test_nothing_of_a_run_stays_where_checkpoints_is_a_link(own: Settings, tmp_path: Path) -> None:
    """The link leads to a larger disk; from leftovers the next run would take the evaluation before training."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    folder = RunFolder(own, {})
    folder.begin(State(NEW))
    folder.before.write_text("{}")
    (folder.checkpoints / ".start.abc").mkdir()  # of a run that was killed
    folder.end()
    assert not list((tmp_path / "scratch").iterdir())


def test_files_of_the_users_in_checkpoints_stay(own: Settings, tmp_path: Path) -> None:
    notes = tmp_path / "checkpoints" / "notes" / "mine.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    folder = RunFolder(own, {})
    folder.begin(folder.look())
    folder.end()
    assert notes.read_text() == "mine"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["notes"]


def test_a_setting_that_a_run_did_not_have_is_named_only_where_it_is_one() -> None:
    said = run_folder.differences({"basis": None}, {"basis": "b", "basis_digest": "1"})
    assert said == "--basis was not given and is b, A and B of the basis have changed"


def test_a_checkpoint_does_not_replace_the_results_of_another_run(cut: Settings, whole: Path, tmp_path: Path) -> None:
    done, named = tmp_path / "done", Path(cut.output) / "checkpoints" / "checkpoint-6"
    shutil.copytree(whole, done)
    summary = json.loads((done / "summary.json").read_text())
    summary["identity"]["seed"] = 1
    (done / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="has a run with other settings: --seed was 1 and is 0"):
        run_finetune(replace(cut, output=str(done), resume=str(named)))
    assert not (done / "checkpoints").exists()


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
    with locked(tmp_path):  # a killed process holds no lock
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "new").exists()


def check_moved(folder: Path, whole: Path) -> None:
    for name in ("answers.json", "energy.png", "lora/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def saved_steps(folder: Path) -> list[int]:
    return [run_folder.step_of(one) for one in run_folder.complete_checkpoints(folder / "checkpoints")]


def test_resume_never_sets_the_former_results_aside_and_removes_nothing(
    own: Settings, whole: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    """Neither a folder of the user's nor results that were set aside earlier are removed."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "former").mkdir()
    (tmp_path / "former" / "thesis.txt").write_text("mine")
    for step, lr in ((2, 1e-3), (1, 2e-3)):  # the second has no results to move
        stop_after(step, replace(own, lr=lr, resume="never"), tmp_path)
        assert ("are moved to" in said()) == (step == 2)
        assert saved_steps(tmp_path) == [step]
    names = {"checkpoints", "config.yaml", "notes.txt", "former", "former-2"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [path.name for path in (tmp_path / "former").iterdir()] == ["thesis.txt"]
    check_moved(tmp_path / "former-2", whole)
    assert RunFolder(replace(own, output=str(tmp_path / "new")), {})._free("former").name == "former"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("builtins.open", PermissionError("read-only file system")),
        ("fcntl.flock", OSError(errno.ENOLCK, "no locks")),
    ],
)
def test_a_folder_that_cannot_be_locked_holds_nobody_up(
    tmp_path: Path, name: str, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, Mock(side_effect=error))
    with locked(tmp_path):
        monkeypatch.undo()


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the file was opened and before it was locked, another process ended and removed it."""
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


def test_auto_saves_before_more_than_ten_minutes_are_lost(own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 100))  # each reading is 100 s after the previous one; a step takes two readings
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    marked = Mock(wraps=run_folder.mark_complete)
    monkeypatch.setattr(run_folder, "mark_complete", marked)
    run_finetune(replace(own, save_steps="auto"))
    saved = [call.args[0].name for call in marked.call_args_list]
    assert saved[-1] == f"checkpoint-{STEPS}"
    assert 2 < len(saved) < STEPS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoint-6", "checkpoint-6: this checkpoint is of another run: --lr was 0.005 and is 0.001"),
        ("nowhere", "--resume is auto, never or the folder of a checkpoint, and there is none at"),
    ],
)
def test_what_is_no_checkpoint_of_this_run_is_refused(cut: Settings, tmp_path: Path, name: str, message: str) -> None:
    other = tmp_path / "other"
    with pytest.raises(ValueError, match=message):
        run_finetune(replace(cut, lr=1e-3, output=str(other), resume=str(tmp_path / "checkpoints" / name)))
    assert not other.exists()


def test_a_run_goes_on_from_the_checkpoint_that_is_named(cut: Settings, whole: Path, tmp_path: Path) -> None:
    run_finetune(replace(cut, resume=str(tmp_path / "checkpoints/checkpoint-6")))
    assert_same(tmp_path, whole)


def flip_a_bit(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 1
    file.write_bytes(damaged)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (Path.unlink, run_folder.MARK, "was cut off while it was written"),
        (Path.unlink, "adapter_model.safetensors", "is incomplete (adapter_model.safetensors is missing)"),
        (shorten, "optimizer.pt", "is damaged (optimizer.pt is not what was written)"),
        (flip_a_bit, "adapter_model.safetensors", "is damaged (adapter_model.safetensors is not what was written)"),
    ],
)
def test_a_half_written_checkpoint_is_left_out(
    cut: Settings, tmp_path: Path, damage: Any, name: str, said: str
) -> None:
    last = tmp_path / "checkpoints/checkpoint-7"
    identity = run_folder.read_mark(last).identity
    damage(last / name)
    with pytest.raises(ValueError, match="this is no complete checkpoint of lorasb finetune"):
        run_finetune(replace(cut, resume=str(last)))
    found = RunFolder(cut, identity).look()
    assert found.checkpoint == str(tmp_path / "checkpoints/checkpoint-6")
    assert found.left_out == [str(last)]
    assert f"checkpoint-7 {said}, and is left out" in found.lines[0]


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        (["checkpoint-7/optimizer.pt", "start/adapter_model.safetensors"], "step 6"),
        (
            [f"checkpoint-{step}/lorasb_factors.safetensors" for step in (6, 7)],
            "from step 0, as it has no checkpoint yet",
        ),
    ],
)
def test_damage_is_found_and_loses_no_more_than_it_has_to(
    cut: Settings, whole: Path, tmp_path: Path, said: Callable[[], str], damaged: list[str], where: str
) -> None:
    for name in damaged:
        flip_a_bit(tmp_path / "checkpoints" / name)
    run_finetune(cut)
    printed = said()
    assert printed.count("is damaged (") == len(damaged)
    assert where in printed
    assert_same(tmp_path, whole)


def test_nothing_is_unpickled_that_is_not_what_was_written(
    cut: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (tmp_path / "checkpoints").rglob("*.p*"):
        flip_a_bit(file)
    monkeypatch.setattr(torch, "load", lambda *given, **named: pytest.fail("a damaged file was unpickled"))
    run_finetune(cut)


FULL = OSError(errno.ENOSPC, "No space left on device")
UNWRITTEN = RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [(Trainer, "_save_optimizer_and_scheduler", UNWRITTEN), (run_folder, "mark_complete", FULL)],
)
def test_a_full_disk_is_one_error_and_loses_nothing(
    cut: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception
) -> None:  # fmt: skip
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    message = (
        r"checkpoint-9 cannot be written: .*No space left.*"
        r"Earlier ones are intact: make room and start the same command again"
    )
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Mock(side_effect=error))
        with pytest.raises(OSError, match=message):
            run_finetune(cut)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    run_finetune(cut)
    assert_same(tmp_path, whole)


def test_a_full_disk_at_the_results_loses_no_training(
    cut: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as patch:
        patch.setattr("lorasb.export.lora.export_lora", Mock(side_effect=error))
        with pytest.raises(OSError, match=r"lora cannot be written: .*No space left"):
            run_finetune(cut)
    monkeypatch.setattr(Trainer, "train", lambda *given, **named: pytest.fail("the model was trained twice"))
    run_finetune(cut)
    assert_same(tmp_path, whole)
    assert results.load(tmp_path).summary["train_losses"]


def test_without_matplotlib_a_run_has_no_pictures(
    own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plotting, "installed", lambda: False)
    run_finetune(replace(own, epochs=0.2))
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".json", ".yaml"}
    assert "no pictures, as matplotlib is not installed" in said()


def test_a_report_to_a_missing_package_is_refused_before_any_work(
    own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finetune, "load_examples", lambda *given: pytest.fail("work began before the check"))
    with pytest.raises(ImportError, match="--report-to wandb needs a package that is not installed: pip install wandb"):
        run_finetune(replace(own, report_to="wandb"))


def test_a_loss_that_is_not_finite_ends_training_before_it_is_saved(
    own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = train._RunTrainer.compute_loss, []

    def broken(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return compute(trainer, *args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(train._RunTrainer, "compute_loss", broken)
    with pytest.raises(ValueError, match=r"step 3: the loss is nan, and training ends before that is saved"):
        run_finetune(replace(own, save_steps="1"))
    assert sorted(map(run_folder.step_of, run_folder.complete_checkpoints(tmp_path / "checkpoints"))) == [1, 2]


def test_a_process_trains_on_one_gpu(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
    assert args.n_gpu <= 1
    args._n_gpu = 2  # as Trainer sets it on a machine with two GPUs, without a launcher
    assert args.train_batch_size == 8
    assert train.on_one_device(args).train_batch_size == 4
