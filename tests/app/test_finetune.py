"""A run that is killed by kill -9 at any moment, or stopped by Ctrl-C or SIGTERM, resumes to the same bits."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import STEPS, At, add, assert_same, die, killed, on_two_processes, stop_after, summary

from lorasb.app import cli, finetune, run_folder
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings
from lorasb.app.terminal import StoppedError
from lorasb.utils import precision
from lorasb.utils.atomic_files import write_json

pytestmark = pytest.mark.usefixtures("blank_pictures")


def test_kill_9_at_random_moments_ends_in_the_same_bits(own: Settings, whole: Path, tmp_path: Path) -> None:
    a, b, c = sorted(random.Random(7).sample(range(1, STEPS), 3))

    def at(place: str) -> Any:
        return lambda patch: patch.setattr(place, lambda *given, **named: die())

    def after(step: int) -> Any:
        return lambda patch: add(patch, At(step, die))

    ways = (
        at("lorasb.init.InitReport.save"), after(a), after(b),
        at("lorasb.app.run_folder.share"), after(c), at("lorasb.export.lora.export_lora"),
    )  # fmt: skip
    for way in ways:
        killed(own, way)
        assert not (tmp_path / "summary.json").exists()
    run_finetune(own)
    assert_same(tmp_path, whole)


def test_dropout_masks_and_other_options_go_on_too(
    base: Settings, tiny: Path, tmp_path: Path, check_resume: Any
) -> None:
    """Attention dropout draws from the global random state at every step; AdamW's decay and a schedule have state."""
    noisy = tmp_path / "model"
    shutil.copytree(tiny, noisy)
    config = json.loads((noisy / "config.json").read_text())
    write_json(noisy / "config.json", config | {"attention_dropout": 0.3})
    layers = {"target_modules": "q_proj,down_proj", "rank_pattern": {"down_proj": 4}, "eval_steps": 4}
    steps = {"gradient_accumulation": 2, "gradient_checkpointing": True, "weight_decay": 0.1, "scheduler": "cosine"}
    settings = replace(base, model=str(noisy), **layers, **steps)
    found = check_resume(settings, 8)  # in the second epoch
    assert [step for step, _ in found["eval_losses"]] == [4, 8, 12]
    assert len(found["train_losses"]) == STEPS
    assert found["trainable_params"] == 2 * (8 * 8 + 4 * 4)
    still = replace(settings, model=base.model, output=str(tmp_path / "c"))
    assert run_finetune(still).summary["train_losses"] != found["train_losses"]  # the masks had an effect


@pytest.mark.parametrize("options", [{"bits": 4}, {"packing": True, "max_length": 16, "batch_size": 2}])
def test_other_bases_and_packs_go_on(base: Settings, check_resume: Any, options: dict[str, Any]) -> None:
    packing = "packing" in options
    found = check_resume(replace(base, epochs=3.0 if packing else 1.0, **options), 4)
    if packing:
        assert found["eval_loss_after"] < found["eval_loss_before"]
        assert found["train_steps"] < 3 * 27 / 2


def test_a_slow_dtype_is_said_in_one_line(
    base: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: Callable[[], str],
) -> None:
    monkeypatch.setattr(precision, "_warned_dtypes", set())
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 40.0)
    monkeypatch.setattr(precision, "native", lambda device="cpu": precision.Precision("float32", "a test"))
    for dtype, lines in (("bfloat16", 1), ("auto", 0)):
        found = finetune.prepare(replace(base, dtype=dtype))
        assert (caplog.text + said()).count("torch takes 40x the time of float32") == lines
        caplog.clear()
        assert str(found.model.dtype) == ("torch.bfloat16" if dtype == "bfloat16" else "torch.float32")


def test_stopping_saves_and_going_on_ends_in_the_same_bits(
    own: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert stop_after(5, own, tmp_path, signal.SIGTERM).code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    steps = sorted(map(run_folder.step_of, run_folder.complete_checkpoints(tmp_path / "checkpoints")))
    assert steps == [3, 5]

    monkeypatch.setattr(finetune, "adapt", lambda *given: pytest.fail("the adapter was initialized twice"))
    titles = []
    evaluate = finetune.Run.evaluate
    monkeypatch.setattr(finetune.Run, "evaluate", lambda run, title: titles.append(title) or evaluate(run, title))
    run_finetune(own)
    assert titles == ["held-out examples, after"]
    assert_same(tmp_path, whole)


def test_a_second_ctrl_c_ends_at_once(own: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, At(4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    with pytest.raises(StoppedError):
        run_finetune(own)
    assert [run_folder.step_of(one) for one in run_folder.complete_checkpoints(tmp_path / "checkpoints")] == [3]


def test_a_signal_before_training_ends_at_once_in_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    monkeypatch.setattr(finetune, "prepare", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["lorasb", "finetune", "--data", str(data), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 143
    assert said() == "lorasb: stopped: rerun the same command to resume"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_processes_train_what_one_does(tiny: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """The same command under torchrun gives the same samples, steps and losses; only rank 0 prints and writes."""
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
