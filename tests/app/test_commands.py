"""The command line, on a tiny model and a few lines of JSONL."""

import errno
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import transformers
from adapters import layers
from command import call
from models import patched
from processes import python
from tiny_run import write_rows

import lorasb
from lorasb.app import adapter, cli, results
from lorasb.app.adapter import run_init
from lorasb.app.prepare import prepare
from lorasb.app.settings import InitSettings, Settings
from lorasb.init import InitReport
from lorasb.ops import registry


def start(name: str, model: Path, data: Path, output: Path, *more: object, way: Any = call) -> str:
    """Return what `lorasb finetune` or `lorasb init` prints when run with the tests' settings."""
    given = {"--model": model, "--data": data, "--output": output, "--r": 8, "--batch-size": 4, "--samples": 8}
    given |= {"--dtype": "float32", "--epochs": 2, "--lr": 5e-3}
    return way(name, *itertools.chain(*given.items()), *more)


@pytest.mark.parametrize(
    ("method", "more"),
    [("lora-sb", {"lora", "report.json", "energy.png"}), ("lora-xs", {"lora", "report.json"}), ("lora", set())],
)
def test_finetune_writes_its_files(tiny: Path, data: Path, tmp_path: Path, method: str, more: set[str]) -> None:
    # one runs in a separate process, as a user would start it
    way = partial(python, "-W", "ignore", "-m", "lorasb", COLUMNS="150") if method == "lora-sb" else call
    printed = start("finetune", tiny, data, tmp_path, "--method", method, way=way)
    usual = {"adapter", "loss.png", "summary.json", "config.yaml", "answers.json"}
    assert {path.name for path in tmp_path.iterdir()} == usual | more
    assert (results.load(tmp_path).report is None) == (method == "lora")
    summary = json.loads((tmp_path / "summary.json").read_text())
    evaluated = (f"eval_{what}_{when}" for what in ("loss", "accuracy") for when in ("before", "after"))
    for key in (*evaluated, "init_seconds", "train_seconds", "tokens_per_second", "peak_rss_mb"):
        assert isinstance(summary[key], float), key
    assert summary["dtype"] == "float32"
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["config"]["method"] == method
    assert summary["adapter_bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert method == "lora" or summary["trainable_params"] == 14 * 8 * 8
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert all(text in printed for text in ("steps of 4", "held-out examples", "exact answers", "lorasb ask"))
    serve = f"vllm serve {tiny} --enable-lora --max-lora-rank 8 --lora-modules adapter={tmp_path / 'lora'}"
    assert (serve in printed) == (method != "lora")


def test_several_held_out_sets_are_told_apart(tiny: Path, data: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"copy {word}", "completion": word} for word in ("true", "false", "red")]
    files = [write_rows(tmp_path / "sure/test.jsonl", lines[:2]), write_rows(tmp_path / "other/test.jsonl", lines[2:])]
    more = ["--eval-data", ",".join(files), "--score", "choice", "--max-new-tokens", "2", "--lora-dropout", "0.1"]
    assert "sure/test.jsonl" in start("finetune", tiny, data, tmp_path / "run", *more)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_examples"] == 3
    assert summary["eval_accuracy_by_set"]["after"][files[1]] == 0.0  # "red" is not one of the choices
    assert set(summary["eval_accuracy_by_set"]["before"]) == set(files)
    # the finished run is shown from its files
    assert "other/test.jsonl" in start("finetune", tiny, data, tmp_path / "run", *more)


def test_inspect_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(scaling=2.0)
    model.peft_config["default"].base_model_name_or_path = "data/x[/v2]/llama"
    with pytest.warns(UserWarning, match="Could not find a config file"):
        model.save_pretrained(tmp_path / "adapter")
    shown = call("inspect", tmp_path / "adapter")
    facts = ("LoRA-SB adapter", "trained parameters", "224", "q_proj", "down_proj", "init: η of the first step", "0.02")
    for text in ("data/x[/v2]/llama", *facts):
        assert text in shown
    assert re.search(r"scaling s\W+2\b", shown)
    assert "--max-lora-rank 8" in call("export", tmp_path / "adapter")
    assert (tmp_path / "adapter-lora" / "adapter_model.safetensors").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    call("export", tmp_path / "adapter", "--output=~/other")
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


def test_doctor() -> None:
    shown = call("doctor")
    for text in ("torch", "peft", "backend eager", "available", "threads", "GPU", "--dtype auto", "LORASB_MAX_CPU_ISA"):
        assert text in shown
    assert " ".join(shown.split()).endswith("lorasb plan MODEL estimates its memory and time.")


def test_init_writes_an_adapter_a_report_and_pictures(tiny: Path, data: Path, tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "signs.safetensors")
    printed = start("init", tiny, data, tmp_path / "run", *cache, "--stability", "--energy", 0.5)
    assert "lorasb: layerwise (2 blocks at model.layers)" in printed
    assert "overlap of two halves of the samples" in printed
    assert "suggested ranks: keeps" in printed
    pictures = ("energy.png", "ranks.png", "spectrum.png")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"adapter", "report.json", "ranks.json", "config.yaml", *pictures}
    for name in pictures:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    report = lorasb.InitReport.load(tmp_path / "run" / "report.json")
    assert report.num_samples == 8
    assert 0 < report.stability <= 1
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    assert all(layer.is_initialized("default") for layer in layers(loaded).values())
    pattern = json.loads((tmp_path / "run" / "ranks.json").read_text())["rank_pattern"]
    again = lorasb.patch(loaded.unload(), r=8, rank_pattern=pattern)
    assert {layer.r["default"] for layer in layers(again).values()} == set(pattern.values())
    of_another_rank = start("init", tiny, data, tmp_path / "again", *cache, "--r", 16)
    assert "no backward" in of_another_rank.replace("\n", " ")


BAD_CALLS = {
    "inspect nowhere": "expected an adapter folder with adapter_config.json",
    "finetune --method magic": "--method must be one of lora-sb, lora-xs, lora, got 'magic'",
    "finetune --dtype int4": "--dtype must be one of auto, bfloat16, float32, float16, got 'int4'",
    "finetune --update lion": "--update must be one of adamw, sgd, per-sample, got 'lion'",
    "finetune --preset metamath": "--preset 'metamath': there is no such preset: did you mean 'metamath-m",
    "finetune --preset qqq": "known are cola-roberta-large, ",
    "finetune --r 0": "--r must be positive, got 0",
    "finetune --task chess": "unknown task 'chess': expected one of word_sequence_reversal",
    "finetune --task chess --rl verifier": "unknown task 'chess': expected one of",
    "finetune --data DATA --model nowhere/none": "cannot load --model 'nowhere/none', expected a folder or hub id",
    "finetune --eval-data x.jsonl": "needs --data, which is not given",
    "finetune --epochs inf": "--epochs must be positive, got inf",
    "finetune --samples 0": "--samples must be positive, got 0",
    "finetune --data DATA --samples 500": "num_samples=500, but the batches hold 27 samples",
    "finetune --data DATA --basis nowhere": "a basis (lorasb basis make), found no basis.json in nowhere",
    "finetune --data DATA --adapter-column user": "line 1: there is no column user (--adapter-column), only prompt, completion",
    "init --data DATA --strategy fast": "strategy must be one of auto, layerwise, accumulate, got 'fast'",
    "init --data DATA --energy 2": "--energy is a share in",
    "init --data DATA --energy 0.5 --parameters 100": "two ways to choose ranks",
    "init --data DATA --parameters 0": "--parameters must be positive, got 0",
    "init --data DATA --memory-budget lots": "expected a size like '6GB' or a number of bytes, got 'lots'",
    "init --data DATA --update sgd --cache x.safetensors": "update='sgd' needs the gradient itself",
}


@pytest.mark.parametrize("line", BAD_CALLS)
def test_bad_calls_end_in_one_line(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:  # fmt: skip
    name, *options = line.replace("DATA", str(data)).split()
    where = [] if name == "inspect" else ["--model", str(tiny), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["lorasb", name, *where, *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 1
    assert BAD_CALLS[line] in " ".join(printed.split())
    assert "Traceback" not in printed
    assert name == "finetune" or not (tmp_path / "run").exists()


def test_init_does_not_replace_a_trained_adapter(whole: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match="has a folder adapter that lorasb init did not write: take another"):
        run_init(InitSettings(output=str(tmp_path / "mine")))
    with pytest.raises(ValueError, match="has a run of lorasb finetune, whose adapter this would replace"):
        run_init(InitSettings(data=str(data), output=str(whole)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that even root cannot write into")
def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "prepare", Mock(side_effect=AssertionError("works")))
    settings = InitSettings(output="/proc/nothing")
    for work in (run_init, lambda settings: adapter.make_basis(settings, ["one.jsonl"])):
        with pytest.raises(OSError, match="/proc/nothing"):
            work(settings)


def test_an_initialization_whose_report_fails_can_be_repeated(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = InitSettings(model=str(tiny), data=str(data), r=4, samples=4, dtype="float32", output=str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device", "report.json")
    with monkeypatch.context() as patch:
        patch.setattr(InitReport, "save", Mock(side_effect=full))
        with pytest.raises(OSError, match="No space"):
            run_init(settings)
    assert not (tmp_path / "adapter").exists()
    assert run_init(settings)[0].num_samples == 4


def test_rows_that_are_cut_and_those_beyond_learned_positions(
    base: Settings, tmp_path: Path, said: Callable[[], str]
) -> None:
    prepare(replace(base, max_length=4))
    assert "30 of 30 examples are longer than --max-length 4: prompts lose their beginning, answers their end" in said()
    prepare(base)
    assert "--max-length" not in said()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 4, "vocab_size": 108}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(base.model).save_pretrained(tmp_path)
    for options, setting in (({}, "--max-length"), ({"max_length": 4, "max_new_tokens": 9}, "--max-new-tokens or")):
        with pytest.raises(ValueError, match=rf"has 4 learned positions, got \d+ tokens: take a smaller {setting}"):
            prepare(replace(base, model=str(tmp_path), **options))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_download_that_is_not_whole_is_one_line(base: Settings, tmp_path: Path, file: str) -> None:
    shutil.copytree(base.model, tmp_path / "model")
    (tmp_path / "model" / file).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"cannot load --model .* \(its files are not complete: git lfs pull"):
        prepare(replace(base, model=str(tmp_path / "model")))


def test_a_bad_variable_is_noticed_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_environment", "")  # the variable is read only once
    monkeypatch.setenv("LORASB_BACKEND", "warp")
    with pytest.raises(ValueError, match="unknown backend 'warp': expected one of auto"):
        call("finetune", "--model", "nowhere/none")


SAID_WITHOUT_TORCH = {
    "--help": "Fine-tune Hugging Face models",
    "--version": "lorasb 0.",
    "finetune --help": "Most used",
    "finetune --lerning-rate 1": "No such option",
    "init --preset cola-roberta-large": "No such option",
    "finetune --data nowhere.jsonl": "expected a JSONL file, found none at nowhere.jsonl",
    "finetune --data rows.csv": "expected a JSONL file, got rows.csv: write each row as one line of JSON",
    "finetune --model ./llama": "--model ./llama: there is no such folder",
    "finetune --config nowhere.yaml": "expected a YAML file of settings",
    "finetune --target-modules (": "expected a regular expression",
    "finetune --r 1024": "--r must be at most 256, got 1024",
    "finetune --lr 1e38": "--lr must be positive, at most 10000",
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
    found = json.loads(python("-c", WITHOUT_TORCH, given=json.dumps(list(SAID_WITHOUT_TORCH))))
    for (line, says), (printed, modules) in zip(SAID_WITHOUT_TORCH.items(), found, strict=True):
        assert modules == [], line
        assert says in " ".join(printed.split()), line
        assert "Traceback" not in printed, line


@pytest.mark.parametrize("delay", [0.05, 1.0, *(pytest.param(delay, marks=pytest.mark.long) for delay in (0.3, 2.5))])
def test_ctrl_c_ends_in_one_line_at_any_time(tiny: Path, data: Path, tmp_path: Path, delay: float) -> None:
    code = "from lorasb.__main__ import main; print('in', flush=True); main()"
    options = ["finetune", "--model", tiny, "--data", data, "--output", tmp_path / "run", "--epochs", "400"]
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, options)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "in\n"
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode in (1, 130)  # click exits with 1 and prints Aborted
    assert "Traceback" not in said
    assert said.strip()
