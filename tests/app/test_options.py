"""Each setting is an option and a line of YAML; options override the file, and the file overrides the preset."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from transformers import SchedulerType
from typer.testing import CliRunner

from lorasb.app import cli
from lorasb.app.cli import app
from lorasb.app.data import NAMED
from lorasb.app.settings import (
    DTYPES,
    PRESETS,
    SCHEDULERS,
    InitSettings,
    Settings,
    option,
    read_config,
    typed,
    write_config,
)
from lorasb.utils import precision

NAMES = [one.name for one in fields(Settings)]
OTHER: dict[str, Any] = {
    "model": "folder", "dtype": "float32", "bits": 4, "task": "gcd", "data": "a.jsonl", "eval_data": "b.jsonl",
    "adapter_column": "user", "basis": "folder", "rl": "exact", "generations": 4, "rl_start": "zero", "temperature": 0.5,
    "sampler": "http://127.0.0.1:8000",
    "train_examples": 7, "eval_examples": 8, "score": "number", "max_new_tokens": 10, "max_length": 9, "packing": True,
    "template": "none", "start": "paper", "eta": 1e-4, "method": "lora-xs", "r": 3, "target_modules": "q_proj,v_proj",
    "rank_pattern": {"down_proj": 2}, "lora_dropout": 0.1, "samples": 5, "update": "sgd", "lr": 1e-5, "find_lr": True,
    "epochs": 2.5, "batch_size": 6, "gradient_accumulation": 2, "gradient_checkpointing": True, "scheduler": "cosine",
    "warmup": 0.2, "weight_decay": 0.01, "seed": 11, "eval_steps": 12, "save_steps": "13", "resume": "never",
    "report_to": "wandb", "output": "elsewhere",
}  # fmt: skip


def call(*arguments: str) -> dict[str, Any]:
    """Return the settings that `lorasb finetune` would run with."""
    got: list[dict[str, Any]] = []
    one = typer.Typer()
    one.command(cls=cli.Command)(cli.command(got.append, Settings))
    done = CliRunner().invoke(one, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return got[0]


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "a.yaml").write_text(text)
    return str(tmp_path / "a.yaml")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: name its base model, or use `lorasb ask` on its run"):
        Settings(model=str(tmp_path)).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": "warp"}, "--scheduler must be one of linear, cosine"),
        ({"report_to": "paper"}, "--report-to must be one of none, tensorboard, wandb"),
        ({"save_steps": "often"}, "--save-steps must be auto or a positive number of steps, got 'often'"),
        ({"save_steps": "0"}, "--save-steps must be auto or a positive number"),
        ({"warmup": 1.0}, r"--warmup is a share in \[0, 1\), got 1.0"),
        ({"lora_dropout": 1.0}, r"--lora-dropout is a share in \[0, 1\), got 1.0"),
        ({"score": "luck"}, "--score must be one of exact, number, boxed, symbolic, choice, label, matthews, pearson, spearman, f1, got 'luck'"),
        ({"bits": 8}, "--bits must be 4 or 16, got 8"),
        ({"weight_decay": -1.0}, "--weight-decay must not be negative"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
        ({"rank_pattern": {"q": 0}}, "--rank-pattern must have positive ranks"),
        ({"eval_steps": 0}, "--eval-steps must be positive, got 0"),
        ({"gradient_accumulation": 3}, "--batch-size 16 is not divisible by --gradient-accumulation 3"),
        ({"lr": float("nan")}, "--lr must be positive, at most 10000, got nan"),
        ({"output": " "}, "--output has to name a folder, got ' '"),
        ({"basis": "b", "r": 4}, "already fixes layers, ranks, A, B and R's start, got --r 4: leave it out"),
        ({"basis": "b", "method": "lora"}, "got --method lora"),
        ({"basis": "b", "target_modules": "q_proj"}, "got --target-modules q_proj"),
        ({"basis": "b", "update": "sgd"}, "got --update sgd"),
        ({"basis": "b", "start": "paper"}, "got --start paper"),
        ({"adapter_column": "a"}, "--adapter-column names a column of --data, which is not given"),
        ({"adapter_column": "a", "data": "b", "method": "lora"}, "excludes --method lora"),
        ({"adapter_column": "a", "data": "b", "lora_dropout": 0.1}, "excludes --lora-dropout"),
        ({"adapter_column": "a", "data": "b", "packing": True}, "excludes --packing"),
        ({"task": "gcd", "data": "rows.jsonl"}, "--task gcd names generated examples"),
        *(({n: None}, "needs a value, got auto: --lr, --epochs and --eta") for n in ("warmup", "temperature", "weight_decay")),
    ],
)  # fmt: skip
def test_values_that_no_run_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values).check()


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    found = InitSettings(output="~/runs", data="~/a.jsonl", eval_data="b.jsonl, ~/c.jsonl", basis="x~", cache="~/signs")
    assert (found.output, found.data, found.eval_data) == (
        "/home/ada/runs",
        "/home/ada/a.jsonl",
        "b.jsonl,/home/ada/c.jsonl",
    )
    assert InitSettings(output="~nobody-of-this-name/x").output == "~nobody-of-this-name/x"
    assert (found.basis, found.cache, found.resume) == ("x~", "/home/ada/signs", "auto")


def test_choices_are_the_librarys() -> None:
    assert set(DTYPES) == {"auto", *precision.DTYPES}
    assert set(SCHEDULERS) <= {one.value for one in SchedulerType}


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_every_setting_is_an_option_and_a_line_of_yaml(tmp_path: Path, values: dict[str, Any]) -> None:
    assert set(OTHER) == set(NAMES)
    assert all(getattr(Settings(), name) != value for name, value in OTHER.items())
    arguments = []
    for name, value in values.items():
        text = ",".join(f"{n}={r}" for n, r in value.items()) if isinstance(value, dict) else str(value)
        arguments += [option(name)] if value is True else [option(name), text]
    assert call(*arguments) == values
    file = tmp_path / "config.yaml"
    write_config(file, Settings(**values))
    assert set(yaml.safe_load(file.read_text())) == set(NAMES) - {"resume"}
    again = read_config(file)
    assert Settings(**{"resume": values.get("resume", "auto")} | again) == Settings(**values)
    assert call("--config", str(file)) == again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"there is no setting 'learning_rte': did you mean 'learning_rate'\?"),
        ("optimizer: adam", r"there is no setting 'optimizer': --help-all lists them"),
        ("lr: 1\nlearning_rate: 2", "'learning_rate' is another name of 'lr', which the file has too"),
        ("batchsize: 4", r"there is no setting 'batchsize': did you mean 'batch_size'\?"),
        ("batch-sizes: 4", r"there is no setting 'batch-sizes': did you mean 'batch_size'\?"),
        ("lr: fast", "lr expects a number or auto, got 'fast'"),
        ("seed: 1.5", "seed expects a whole number, got 1.5"),
        ("seed: true", "seed expects a whole number, got True"),
        ("packing: 3", "packing expects true or false, got 3"),
        ("model: [a]", r"model expects a text, got \['a'\]"),
        ("rank_pattern: 3", "rank_pattern expects ranks by name, like down_proj=96,q_proj=32 or JSON, got 3"),
        ("- a", "expected lines like `lr: 0.002`, got list"),
        ("a: [", "this is no YAML"),
        ("!!python/object/apply:os.getcwd []", "this is no YAML"),
        ("rl: reward.py:score", "rl is reward.py:score, and the run would execute that file: add --allow-code"),
        *((f"rl: {reward}", "rl is .*: add --allow-code") for reward in ("evil.so:reward", "a.PY:f", "module:f")),
    ],
)
def test_wrong_lines_are_named_with_their_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--config .*a.yaml: {message}"):
        call("--config", written(tmp_path, text))


def test_ranks_by_name_are_pairs_or_json() -> None:
    for text in ("down_proj=96,q_proj=32", '{"down_proj": 96, "q_proj": 32}'):
        assert typed(text, dict[str, int], "x") == {"down_proj": 96, "q_proj": 32}
    for text in ("down_proj", "down_proj=x", '{"a": "b"}', "{", "[1]"):
        with pytest.raises(ValueError, match="--rank-pattern expects ranks by name"):
            typed(text, dict[str, int], "--rank-pattern")


@pytest.mark.parametrize(
    ("text", "more", "want"),
    [
        ("lr: 2e-3\nseed: 4\npacking: true", ["--seed", "5", "--no-packing"], {"lr": 2e-3, "seed": 5, "packing": False}),
        ("learning-rate: 3e-4\nrank: 8\n--batch-size: 4\nepochs: auto", [], {"lr": 3e-4, "r": 8, "batch_size": 4, "epochs": None}),
        ("rl: reward.py:score", ["--allow-code"], {"rl": "reward.py:score"}),
        ("rl: reward.py:score", ["--rl", "other.py:score"], {"rl": "other.py:score"}),
        ("rl: exact", [], {"rl": "exact"}),
        # an earlier version wrote the default task, too, when it trained on a file
        ("task: word_sequence_reversal\ndata: rows.jsonl\nepochs: 1.0", [], {"data": "rows.jsonl", "epochs": 1.0}),
        ("task: gcd\ndata: rows.jsonl", [], {"task": "gcd", "data": "rows.jsonl"}),
    ],
    ids=["options", "aliases", "allowed code", "code by option", "our reward", "an earlier version", "another task"],
)  # fmt: skip
def test_a_file_gives_what_options_do_not(tmp_path: Path, text: str, more: list[str], want: dict[str, Any]) -> None:
    assert call("--config", written(tmp_path, text), *more) == want


def test_the_last_of_a_switchs_forms_wins() -> None:
    on = ("--packing true", "--packing True --seed 3", "--no-packing --packing")
    off = ("--packing false", "--no-packing", "--packing --no-packing")
    for _ in range(2):
        assert all(call(*given.split())["packing"] is True for given in on)
        assert all(call(*given.split())["packing"] is False for given in off)
        text = CliRunner().invoke(app, ["finetune", "--help"]).output  # printing help must not change the options
    assert "--no-packing" not in text
    assert "--no-NAME" in text


def test_dtypes_have_short_names() -> None:
    assert Settings(**call("--dtype", "fp32")).dtype == "float32"


@pytest.mark.parametrize("kind", ["--help", "--help-all"])
def test_help_has_every_option_whole_in_eighty_columns(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = CliRunner().invoke(app, ["finetune", kind]).output
    assert "…" not in text
    folded = [one for one in fields(Settings) if one.name not in cli.MOST_USED]
    assert all(option(name) in text for name in NAMES)
    assert 12 <= len(NAMES) - len(folded) <= 14
    explained = text.replace("\n", " ").partition("Most used")[2]
    for one in folded:
        assert (f"─ {one.metadata['group'].capitalize()} ─" in explained) == (kind == "--help-all")
    assert len(text.splitlines()) < 80 or kind == "--help-all"
    assert CliRunner().invoke(app, ["finetune", "--help"]).output == text or kind == "--help-all"  # folded again


LISTED = ("batch_size", "gradient_accumulation", "max_length", "epochs", "lora_dropout", "lr", "scheduler", "warmup")
TABLES: dict[str, tuple[Any, ...]] = {  # the paper's Tables 11 and 12; the rows of Table 12 differ only in epochs
    "metamath-mistral-7b": (32, 32, 512, 1, 0.0, 1e-4, "cosine", 0.02),
    "metamath-gemma-2-9b": (32, 32, 512, 1, 0.0, 1e-4, "cosine", 0.02),
    "commonsense-llama-3.2-3b": (144, 24, 256, 2, 0.05, 2e-3, "linear", 0.02),
} | {
    f"{task}-roberta-large": (128, 1, 256, epochs, 0.0, 1e-3, "linear", 0.06)
    for task, epochs in {"cola": 30, "rte": 30, "mrpc": 30, "sst2": 15, "qnli": 15, "stsb": 30}.items()
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_run_with_the_papers_settings(name: str) -> None:
    assert set(PRESETS) == set(TABLES)
    settings = Settings(**call("--preset", name))
    settings.check()
    assert settings.output == f"runs/{name}"
    assert {settings.data, *(settings.eval_data or "gsm8k").split(",")} <= set(NAMED)
    assert tuple(getattr(settings, name) for name in LISTED) == TABLES[name]


def test_options_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file, preset = written(tmp_path, "r: 8\nseed: 4\n"), "metamath-mistral-7b"
    found = call("--preset", preset, "--config", file, "--seed", "5")
    assert found == read_config(PRESETS[preset]) | {"r": 8, "seed": 5}
