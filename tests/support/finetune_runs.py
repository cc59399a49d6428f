"""Runs of `lorasb finetune` that are stopped or killed after a step, and what two runs must have in common."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import attempt
from trainer_runs import At
from transformers import TrainerCallback

from lorasb.app import train
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings
from lorasb.app.terminal import StoppedError

TIMES = ("init_seconds", "train_seconds", "tokens_per_second", "peak_rss_mb")
STEPS = 14  # 27 examples, 2 epochs, 4 per step


def summary(folder: Path) -> dict[str, Any]:
    """A run's summary without what differs between runs: times, the output folder and `resume`."""
    found = json.loads((folder / "summary.json").read_text())
    for name in TIMES:
        found.pop(name)
    found["config"].pop("output")
    found["config"].pop("resume")
    return found


def assert_same(folder: Path, other: Path) -> None:
    """Assert that two runs left the same files: adapters and answers to the bit, summaries except for times."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "summary.json"} < names
    assert names == {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    of_the_run = ("adapter/adapter_", "lora/adapter_")
    for name in sorted(name for name in names if name.startswith(of_the_run) or name.endswith(".safetensors")):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert summary(folder) == summary(other)
    assert (folder / "answers.json").read_bytes() == (other / "answers.json").read_bytes()
    assert not (folder / "checkpoints").exists()


def add(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Add a callback to the trainer of the next run."""
    put = train._put_callbacks

    def more(trainer: Any, *given: Any) -> None:
        trainer.add_callback(callback)
        put(trainer, *given)

    monkeypatch.setattr(train, "_put_callbacks", more)


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_after(step: int, base: Settings, folder: Path, number: int = signal.SIGINT) -> StoppedError:
    """Start a run, interrupt it after a step and return what it raised."""
    with pytest.MonkeyPatch.context() as patch:
        add(patch, At(step, lambda: os.kill(os.getpid(), number)))
        with pytest.raises(StoppedError, match="rerun the same command to resume") as stopped:
            run_finetune(replace(base, output=str(folder)))
    return stopped.value


def killed(settings: Settings, arrange: Any) -> None:
    """Run in a child process that `arrange` sets up to be killed by kill -9."""
    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        arrange(patch)
        try:
            run_finetune(settings)
        finally:
            os._exit(0)  # reached only if it was not killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def on_two_processes(given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run `lorasb finetune` under torchrun with these options added to the tests' usual ones."""
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lorasb"]
    usual = {"--rank": 8, "--epochs": 2, "--batch-size": 4, "--samples": 8, "--dtype": "float32", "--lr": 5e-3}
    options = (str(part) for pair in (usual | given).items() for part in pair)
    done = attempt(*launcher, "finetune", *options, cwd=Path.cwd(), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    return done
