"""The command line, on a tiny model and a few lines of JSONL."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import patched
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasb.app import cli


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorasb", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


def lorasb(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has loaded all that it needs."""
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(list(map(str, arguments)), done.exit_code, done.stdout, done.output)


def finetune(tiny: Path, data: Path, output: Path, *more: object, way: Any = lorasb) -> Any:
    given = {"--model": tiny, "--data": data, "--output": output, "--r": 8, "--epochs": 2, "--batch-size": 4}
    given |= {"--samples": 8, "--dtype": "float32", "--lr": 5e-3}
    return way("finetune", *itertools.chain(*given.items()), *more)


@pytest.mark.parametrize("method", ["lora-sb", "lora-xs", "lora"])
def test_finetune_writes_its_files(tiny: Path, data: Path, tmp_path: Path, method: str) -> None:
    done = finetune(tiny, data, tmp_path, "--method", method, way=process if method == "lora-sb" else lorasb)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    wanted = {"adapter", "loss.png", "summary.json", "config.yaml", "answers.json"}
    if method != "lora":
        wanted |= {"lora", "report.json"}
    if method == "lora-sb":
        wanted |= {"energy.png"}
    assert names == wanted
    summary = json.loads((tmp_path / "summary.json").read_text())
    evaluated = (f"eval_{what}_{when}" for what in ("loss", "accuracy") for when in ("before", "after"))
    for key in (*evaluated, "init_seconds", "train_seconds", "tokens_per_second", "peak_rss_mb"):
        assert isinstance(summary[key], float), key
    assert summary["dtype"] == "float32"
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["config"]["method"] == method
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert summary["adapter_bytes"] == weights.stat().st_size
    if method != "lora":
        assert summary["trainable_params"] == 14 * 8 * 8
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out problems" in done.stdout
    assert "exact answers" in done.stdout


def test_several_held_out_sets_are_told_apart(tiny: Path, data: Path, tmp_path: Path) -> None:
    """Two sets, judged by choice, answers of at most two tokens."""
    lines = [{"prompt": f"copy {word}", "completion": word} for word in ("true", "false", "red")]
    files = {name: tmp_path / name / "test.jsonl" for name in ("sure", "other")}
    for name, part in (("sure", lines[:2]), ("other", lines[2:])):
        files[name].parent.mkdir()
        files[name].write_text("".join(json.dumps(line) + "\n" for line in part))
    sets = ",".join(map(str, files.values()))
    more = ["--eval-data", sets, "--score", "choice", "--max-new-tokens", "2", "--lora-dropout", "0.1"]
    done = finetune(tiny, data, tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_examples"] == 3
    assert summary["eval_accuracy_by_set"]["after"][str(files["other"])] == 0.0  # "red" is no choice
    assert set(summary["eval_accuracy_by_set"]["before"]) == {str(file) for file in files.values()}
    assert "sure/test.jsonl" in done.stdout
    again = finetune(tiny, data, tmp_path / "run", *more)  # finished: from its files
    assert "other/test.jsonl" in again.stdout


def test_the_same_seed_gives_the_same_adapter(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert finetune(tiny, data, tmp_path / name, "--seed", seed, "--epochs", 0.3).returncode == 0
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert not all(torch.equal(value, found[2][key]) for key, value in found[0].items())


def test_inspect_and_export(tmp_path: Path) -> None:
    patched().save_pretrained(tmp_path / "adapter")
    shown = lorasb("inspect", tmp_path / "adapter")
    assert shown.returncode == 0, shown.stderr
    for text in ("LoRA-SB adapter", "trained parameters", "224", "q_proj", "down_proj", "init: lr", "0.02"):
        assert text in shown.stdout
    exported = lorasb("export", tmp_path / "adapter")
    assert exported.returncode == 0, exported.stderr
    assert "--max-lora-rank 8" in exported.stdout
    assert (tmp_path / "adapter-lora" / "adapter_model.safetensors").is_file()


def test_doctor() -> None:
    shown = lorasb("doctor")
    assert shown.returncode == 0, shown.stderr
    for text in ("torch", "peft", "backend eager", "available", "threads", "GPU", "--dtype auto", "LORASB_MAX_CPU_ISA"):
        assert text in shown.stdout
    assert " ".join(shown.stdout.split()).endswith("lorasb plan MODEL says what one of them takes.")


BAD_CALLS = {
    "inspect nothing": (["inspect", "nowhere"], "expected an adapter folder with adapter_config.json"),
    "method": (["finetune", "--method", "magic"], "--method must be one of lora-sb, lora-xs, lora, got 'magic'"),
    "dtype": (["finetune", "--dtype", "int4"], "--dtype must be one of auto, bfloat16, float32, float16, got 'int4'"),
    "update": (["finetune", "--update", "lion"], "--update must be one of adamw, sgd, per-sample, got 'lion'"),
    "preset": (["finetune", "--preset", "metamath"], "--preset 'metamath': there is no such preset: did you mean"),
    "rank": (["finetune", "--r", "0"], "--r must be positive, got 0"),
    "task": (["finetune", "--task", "chess"], "unknown task 'chess': expected one of word_sequence_reversal"),
    "model": (
        ["finetune", "--model", "nowhere/none"],
        "cannot load --model 'nowhere/none', expected a folder or hub id",
    ),
    "held out of nothing": (["finetune", "--eval-data", "x.jsonl"], "needs --data, which is not given"),
    "epochs": (["finetune", "--epochs", "inf"], "--epochs must be positive, got inf"),
    "verifier": (["finetune", "--task", "chess", "--rl", "verifier"], "unknown task 'chess': expected one of"),
    "samples": (["finetune", "--samples", "0"], "--samples must be positive, got 0"),
    "too many samples": (["finetune", "--samples", "500"], "num_samples=500, but the batches hold 27 samples"),
    "data": (["finetune", "--data", "nowhere.jsonl"], "expected a JSONL file, found none"),
    "backend": (["finetune", "--data", "x"], "unknown backend 'warp': expected one of auto"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_end_in_one_line(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:  # fmt: skip
    arguments, message = BAD_CALLS[name]
    if name in ("backend", "model", "too many samples"):
        arguments = [*arguments[:1], "--data", str(data), *(arguments[1:] if name != "backend" else [])]
    model = ["--output", str(tmp_path)] if arguments[0] == "finetune" else []
    if model and name != "model":
        model += ["--model", str(tiny)]
    if name == "backend":  # a process of its own, as the variable is read once
        done = process(*arguments, *model, LORASB_BACKEND="warp")
        code, printed = done.returncode, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", ["lorasb", *arguments, *model])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code, printed = stopped.value.code, capsys.readouterr().err
    assert code == 1
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed


SAID_WITHOUT_TORCH = {
    "--help": "Fine-tune Hugging Face models",
    "--version": "lorasb 0.",
    "finetune --help": "Most used",
    "finetune --lerning-rate 1": "No such option",
    "finetune --data nowhere.jsonl": "expected a JSONL file, found none at nowhere.jsonl",
    "finetune --model ./llama": "--model ./llama: there is no such folder",
    "finetune --config nowhere.yaml": "expected a YAML file of settings",
    "finetune --target-modules (": "expected a regular expression",
    "finetune --r 1024": "--r must be at most 256, got 1024",
    "finetune --lr 1e38": "--lr must be positive, at most 10000",
    "finetune --task gcd --data x.jsonl": "--task gcd names generated examples",
    "finetune --output ": "--output has to name a folder",
}
WITHOUT_TORCH = """
import contextlib, io, json, sys
from lorasb.__main__ import main
found = []
for line in json.load(sys.stdin):
    sys.argv, said = ["lorasb", *line.split(" ")], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main()
    found.append([said.getvalue(), sorted({"torch", "transformers", "peft"} & set(sys.modules))])
print(json.dumps(found))
"""


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    command, given = [sys.executable, "-c", WITHOUT_TORCH], json.dumps(list(SAID_WITHOUT_TORCH))
    found = json.loads(subprocess.check_output(command, input=given, text=True))
    for (line, says), (printed, modules) in zip(SAID_WITHOUT_TORCH.items(), found, strict=True):
        assert modules == [], line
        assert says in " ".join(printed.split()), line
        assert "Traceback" not in printed, line


@pytest.mark.parametrize("delay", [0.05, 1.0, *(pytest.param(delay, marks=pytest.mark.long) for delay in (0.3, 2.5))])
def test_ctrl_c_ends_in_one_line_at_any_time(tiny: Path, data: Path, tmp_path: Path, delay: float) -> None:
    """While modules are imported, too."""
    code = "from lorasb.__main__ import main; print('in', flush=True); main()"
    options = ["finetune", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--epochs", "400"]
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode in (1, 130)  # 1 of click, which says Aborted
    assert "Traceback" not in said
    assert said.strip()


def test_switches_and_the_dtype_s_short_names_are_taken(tiny: Path, data: Path, tmp_path: Path) -> None:
    done = finetune(tiny, data, tmp_path / "run", "--dtype", "fp32", "--packing", "true")
    assert done.returncode == 0, done.stdout
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "dtype: float32" in config
    assert "packing: true" in config
    assert "lorasb ask" in done.stdout


def test_few_rows_are_trained_for_sixty_steps(tiny: Path, tmp_path: Path) -> None:
    """The user hears of it before the run, not after a useless one."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"copy red {i}", "completion": "red"}) for i in range(60)))
    where = ("--model", tiny, "--data", file, "--output", tmp_path / "run")
    done = lorasb("finetune", *where, "--r", "4", "--samples", "8")
    assert done.returncode == 0, done.stdout
    assert "60 steps of 16 (15 passes, --epochs auto)" in " ".join(done.stdout.split())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_steps"] == 60
