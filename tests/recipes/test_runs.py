"""Runs that are cut off, stopped, or started again: what is kept, and the bits they end in."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import WORDS
from transformers import Trainer, TrainerCallback

from lorasb.cli import app as cli
from lorasb.recipes import adapter as adapting
from lorasb.recipes import callbacks as course
from lorasb.recipes import checkpoints, finetune
from lorasb.recipes import train as training
from lorasb.recipes.finetune import run_finetune
from lorasb.recipes.results import Result
from lorasb.recipes.settings import Settings
from lorasb.recipes.signals import StoppedError
from lorasb.utils import precision
from lorasb.utils.atomic_files import write_json

TIMES = ("init_seconds", "train_seconds", "tokens_per_second", "peak_rss_mb")
STEPS = 14  # 27 examples, twice, four a step


@pytest.fixture(scope="module")
def base(tiny: Path, data: Path) -> Settings:
    return Settings(
        model=str(tiny), data=str(data), r=8, epochs=2.0, batch_size=4, samples=8, dtype="float32", lr=5e-3,
        save_steps="3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_finetune(replace(base, output=str(folder)))
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    for name in TIMES:
        found.pop(name)
    found["config"].pop("output")
    found["config"].pop("resume")
    return found


def assert_same(folder: Path, other: Path) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "summary.json"} < names
    assert names == {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    for name in sorted(name for name in names if name.startswith(("adapter/adapter_", "lora/adapter_"))):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert summary(folder) == summary(other)
    assert (folder / "answers.json").read_bytes() == (other / "answers.json").read_bytes()
    assert not (folder / "checkpoints").exists()


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def add(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    put = training._put_callbacks

    def more(trainer: Any, *given: Any) -> None:
        trainer.add_callback(callback)
        put(trainer, *given)

    monkeypatch.setattr(training, "_put_callbacks", more)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_after(step: int, base: Settings, folder: Path, number: int = signal.SIGINT) -> StoppedError:
    with pytest.MonkeyPatch.context() as patch:
        add(patch, At(step, lambda: os.kill(os.getpid(), number)))
        with pytest.raises(StoppedError, match="the same command goes on from here") as stopped:
            run_finetune(replace(base, output=str(folder)))
    return stopped.value


def killed(settings: Settings, arrange: Any) -> None:
    """Run in a child that arranges its own death by kill -9."""
    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        arrange(patch)
        try:
            run_finetune(settings)
        finally:
            os._exit(0)  # it was to die before
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_kill_9_at_random_moments_ends_in_the_same_bits(base: Settings, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    settings = replace(base, output=str(tmp_path))
    moments = sorted(chance.sample(range(1, STEPS), 3))

    def after_a_step(step: int) -> Any:
        return lambda patch: add(patch, At(step, die))

    def amid_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(training, "share", lambda folder: die())

    def before_training(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(adapting.InitReport, "save", lambda report, path: die())

    def amid_the_results(patch: pytest.MonkeyPatch) -> None:
        patch.setattr("lorasb.export.lora.export_lora", lambda *given, **named: die())

    ways = [before_training, *map(after_a_step, moments[:2]), amid_a_checkpoint, after_a_step(moments[2])]
    for way in [*ways, amid_the_results]:
        killed(settings, way)
        assert not (tmp_path / "summary.json").exists()
    run_finetune(settings)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_saves_and_going_on_ends_in_the_same_bits(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = stop_after(5, base, tmp_path, number)
    assert stopped.code == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    steps = sorted(map(checkpoints.step_of, checkpoints.whole(tmp_path / "checkpoints")))
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
    assert [checkpoints.step_of(one) for one in checkpoints.whole(tmp_path / "checkpoints")] == [3]


def test_ctrl_c_before_training_ends_at_once(base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "prepare", lambda *given: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StoppedError):
        run_finetune(replace(base, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_gives_its_results_again(
    base: Settings, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "prepare", lambda *given: pytest.fail("nothing is loaded"))
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    found = run_finetune(replace(base, output=str(whole)))
    assert isinstance(found, Result)
    assert found.summary == json.loads((whole / "summary.json").read_text())
    assert found.report is not None
    assert found.report.num_samples == 8
    assert len(found.before.answers) == len(found.after.answers) == len(found.examples) == 3
    assert "is finished: these are its results" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


class TestRefusals:
    def test_other_settings_by_name(self, base: Settings, whole: Path, tmp_path: Path) -> None:
        other = replace(base, output=str(whole), lr=1e-3, rank_pattern={"q_proj": 4})
        with pytest.raises(
            ValueError,
            match=r"has a run with other settings: --rank-pattern was None and is .*, --lr was 0.005 and is 0.001\. Take another --output, or --resume never",
        ):
            run_finetune(other)
        stop_after(4, base, tmp_path)
        with pytest.raises(ValueError, match="other settings: --seed was 0 and is 1"):
            run_finetune(replace(base, output=str(tmp_path), seed=1))
        assert len(checkpoints.whole(tmp_path / "checkpoints")) == 2

    def test_other_examples_in_the_same_file(self, base: Settings, data: Path, tmp_path: Path) -> None:
        file, output = tmp_path / "data.jsonl", str(tmp_path / "run")
        shutil.copy(data, file)
        stop_after(4, replace(base, data=str(file)), Path(output))
        file.write_text(file.read_text() + json.dumps({"prompt": "one more", "completion": WORDS[0]}) + "\n")
        with pytest.raises(ValueError, match="other settings: the examples themselves have changed"):
            run_finetune(replace(base, data=str(file), output=output))

    def test_settings_that_change_nothing_may_differ(self, base: Settings, whole: Path) -> None:
        run_finetune(replace(base, output=str(whole), save_steps="5", resume="auto"))

    def test_never_starts_anew(self, base: Settings, tmp_path: Path) -> None:
        stop_after(4, base, tmp_path)
        stop_after(2, replace(base, lr=1e-3, resume="never"), tmp_path)
        assert [checkpoints.step_of(one) for one in checkpoints.whole(tmp_path / "checkpoints")] == [2]

    def test_a_foreign_checkpoint(self, base: Settings, tmp_path: Path) -> None:
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
    def test_what_is_no_checkpoint(self, base: Settings, tmp_path: Path, made: bool, message: str) -> None:
        folder = tmp_path / "checkpoint-3"
        if made:
            folder.mkdir()
        with pytest.raises(ValueError, match=message):
            run_finetune(replace(base, output=str(tmp_path / "run"), resume=str(folder)))


def test_going_on_from_a_checkpoint_that_is_named(base: Settings, whole: Path, tmp_path: Path) -> None:
    stop_after(7, base, tmp_path)
    chosen = tmp_path / "checkpoints" / "checkpoint-6"
    run_finetune(replace(base, output=str(tmp_path), resume=str(chosen)))
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("damage", ["mark", "truncated", "missing"])
def test_a_half_written_checkpoint_is_left_out(
    base: Settings, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    stop_after(7, base, tmp_path)
    last = tmp_path / "checkpoints" / "checkpoint-7"
    if damage == "mark":
        (last / checkpoints.MARK).unlink()
    elif damage == "truncated":
        file = last / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (last / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="this is no whole checkpoint of lorasb finetune"):
        run_finetune(replace(base, output=str(tmp_path), resume=str(last)))
    run_finetune(replace(base, output=str(tmp_path)))
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-7 was cut off while it was written, and is left out" in said
    assert "step 6" in said
    assert_same(tmp_path, whole)


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
            patch.setattr(training, "share", full)
        else:
            patch.setattr(checkpoints, "write_json", full)
        with pytest.raises(
            OSError,
            match=r"checkpoint-6 cannot be written: .*No space left.*Those before it are whole: make room and start the same command again",
        ):
            run_finetune(replace(base, output=str(tmp_path)))
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    run_finetune(replace(base, output=str(tmp_path)))
    assert_same(tmp_path, whole)


def test_dropout_masks_and_the_other_options_go_on_too(base: Settings, tiny: Path, tmp_path: Path) -> None:
    """Attention dropout draws from the global random state at every step; AdamW's decay and a schedule have a state."""
    noisy = tmp_path / "model"
    shutil.copytree(tiny, noisy)
    config = json.loads((noisy / "config.json").read_text())
    write_json(noisy / "config.json", config | {"attention_dropout": 0.3})
    settings = replace(
        base, model=str(noisy), gradient_accumulation=2, gradient_checkpointing=True, weight_decay=0.1,
        scheduler="cosine", eval_steps=4, target_modules="q_proj,down_proj", rank_pattern={"down_proj": 4},
    )  # fmt: skip
    run_finetune(replace(settings, output=str(tmp_path / "a")))
    stop_after(8, settings, tmp_path / "b")  # in the second epoch
    run_finetune(replace(settings, output=str(tmp_path / "b")))
    assert_same(tmp_path / "a", tmp_path / "b")
    found = summary(tmp_path / "a")
    assert [step for step, _ in found["eval_losses"]] == [4, 8, 12]
    assert len(found["train_losses"]) == STEPS
    assert found["trainable_params"] == 2 * (8 * 8 + 4 * 4)
    still = replace(settings, model=base.model, output=str(tmp_path / "c"))
    assert run_finetune(still).summary["train_losses"] != found["train_losses"]  # the masks did something


@pytest.mark.parametrize(("method", "bits"), [("lora", 16), ("lora-xs", 16), ("lora-sb", 4)])
def test_other_methods_and_bases_go_on(base: Settings, tmp_path: Path, method: str, bits: int) -> None:
    settings = replace(base, method=method, bits=bits)
    run_finetune(replace(settings, output=str(tmp_path / "a")))
    stop_after(4, settings, tmp_path / "b")
    run_finetune(replace(settings, output=str(tmp_path / "b")))
    assert_same(tmp_path / "a", tmp_path / "b")


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
    assert capsys.readouterr().err.strip() == "lorasb: stopped: the same command goes on from here"


def test_packs(base: Settings, whole: Path, tmp_path: Path) -> None:
    settings = replace(base, packing=True, max_length=16, output=str(tmp_path / "a"), batch_size=2, epochs=3.0)
    found = run_finetune(settings).summary
    assert found["eval_loss_after"] < found["eval_loss_before"]
    assert found["train_steps"] < 3 * 27 / 2
    stop_after(4, settings, tmp_path / "b")
    run_finetune(replace(settings, output=str(tmp_path / "b")))
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_run_is_repeated_from_its_config(base: Settings, whole: Path, tmp_path: Path) -> None:
    from lorasb.cli import options
    from lorasb.recipes.settings import listed

    values = options.read_config(whole / "config.yaml", {one.name: kind for one, kind in listed(Settings)})
    run_finetune(Settings(**values | {"output": str(tmp_path)}))
    assert_same(tmp_path, whole)


def test_auto_saves_before_more_than_ten_minutes_are_lost(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**9, 100))  # each look at it is 100 s after the one before: two looks a step
    saved: list[float] = []
    monkeypatch.setattr(course, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    keep = checkpoints.complete
    monkeypatch.setattr(
        training.checkpoints,
        "complete",
        lambda folder, *rest: saved.append(checkpoints.step_of(folder)) or keep(folder, *rest),
    )
    run_finetune(replace(base, output=str(tmp_path), save_steps="auto"))
    assert saved[-1] == STEPS
    assert 2 < len(saved) < STEPS


def test_a_full_disk_at_the_results(
    base: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    from lorasb.recipes import results

    def full(*given: Any, **named: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("lorasb.export.lora.export_lora", full)
        with pytest.raises(OSError, match=r"lora cannot be written: .*No space left"):
            run_finetune(replace(base, output=str(tmp_path)))
    monkeypatch.setattr(Trainer, "train", lambda *given, **named: pytest.fail("nothing is trained twice"))
    run_finetune(replace(base, output=str(tmp_path)))
    assert_same(tmp_path, whole)
    assert results.load(tmp_path).summary["train_losses"]


@pytest.mark.long
def test_two_processes_train_what_one_does(tiny: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """The same command under torchrun: the same samples, steps and losses; only rank 0 prints and writes."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lorasb"]
    options = ["finetune", "--model", tiny, "--data", data, "--output", tmp_path, "--rank", "8", "--epochs", "2",
               "--batch-size", "4", "--samples", "8", "--dtype", "float32", "--lr", "5e-3"]  # fmt: skip
    done = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert done.stdout.count("exact answers") == done.stdout.count("computed in") == 1
    ours, alone = summary(tmp_path), summary(whole)
    assert ours["identity"]["processes"] == 2
    assert ours["train_losses"] == pytest.approx(alone["train_losses"], rel=0.05)
    assert ours["eval_loss_before"] == pytest.approx(alone["eval_loss_before"], rel=1e-5)
    assert ours["train_losses"][0] == pytest.approx(alone["train_losses"][0], rel=1e-4)


def test_a_report_to_a_package_that_is_missing(base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(finetune, "load_examples", lambda *given: pytest.fail("it is noticed before any work"))
    for name in ("wandb", "tensorboard"):
        with pytest.raises(
            ImportError, match=f"--report-to {name} needs a package that is not installed: pip install {name}"
        ):
            run_finetune(replace(base, report_to=name, output=str(tmp_path)))


def test_a_launch_that_shards_the_model(base: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="this launch asks for FSDP: write a script with Trainer"):
        run_finetune(base)


def test_data_that_is_empty_or_has_a_broken_line(base: Settings, tmp_path: Path) -> None:
    file, output = tmp_path / "data.jsonl", tmp_path / "run"
    for text, message in (
        ("", "holds no examples"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt"', "line 2: expected an object"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_finetune(replace(base, data=str(file), output=str(output)))
    assert not output.exists()


def test_a_slow_dtype_is_said_in_one_line(
    base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 40.0)
    monkeypatch.setattr(precision, "native", lambda device="cpu": precision.Precision("float32", "a test"))
    for dtype, lines in (("bfloat16", 1), ("auto", 0)):
        found = run_finetune(replace(base, dtype=dtype, epochs=0.2, output=str(tmp_path / dtype))).summary
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("torch takes 40x the time of float32") == lines
        assert found["dtype"] == found["identity"]["dtype"] == ("bfloat16" if dtype == "bfloat16" else "float32")
        assert found["config"]["dtype"] == dtype
