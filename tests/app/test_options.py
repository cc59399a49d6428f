"""Options made of the list of settings: each is an option and a line of YAML, and an option goes first."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from parsed_options import call
from typer.testing import CliRunner

from lorasb.app import cli, config_file
from lorasb.app.cli import app
from lorasb.app.settings import InitSettings, Settings, listed, option

KNOWN = {one.name: kind for one, kind in listed(Settings)}
OTHER = {
    "model": "folder",
    "dtype": "float32",
    "bits": 4,
    "task": "gcd",
    "data": "a.jsonl",
    "eval_data": "b.jsonl",
    "adapter_column": "user",
    "rl": "exact",
    "generations": 4,
    "rl_start": "zero",
    "temperature": 0.5,
    "train_examples": 7,
    "eval_examples": 8,
    "score": "number",
    "max_new_tokens": 10,
    "max_length": 9,
    "packing": True,
    "template": "none",
    "start": "paper",
    "eta": 1e-4,
    "method": "lora-xs",
    "r": 3,
    "target_modules": "q_proj,v_proj",
    "rank_pattern": {"down_proj": 2},
    "lora_dropout": 0.1,
    "samples": 5,
    "update": "sgd",
    "lr": 1e-5,
    "find_lr": True,
    "epochs": 2.5,
    "batch_size": 6,
    "gradient_accumulation": 2,
    "gradient_checkpointing": True,
    "scheduler": "cosine",
    "warmup": 0.2,
    "weight_decay": 0.01,
    "seed": 11,
    "eval_steps": 12,
    "save_steps": "13",
    "resume": "never",
    "report_to": "wandb",
    "output": "elsewhere",
}


def arguments(values: dict[str, Any]) -> list[str]:
    found = []
    for name, value in values.items():
        if value is True:
            found += ["--" + name.replace("_", "-")]
        else:
            text = ",".join(f"{n}={r}" for n, r in value.items()) if isinstance(value, dict) else str(value)
            found += ["--" + name.replace("_", "-"), text]
    return found


def test_every_setting_is_an_option_and_a_line_of_yaml(tmp_path: Path) -> None:
    assert set(OTHER) == {one.name for one in fields(Settings)} == set(KNOWN)
    assert all(getattr(Settings(), name) != value for name, value in OTHER.items())
    assert call(*arguments(OTHER)) == OTHER
    config_file.write_config(tmp_path / "config.yaml", Settings(**OTHER))
    again = config_file.read_config(tmp_path / "config.yaml", KNOWN)
    assert again == {name: value for name, value in OTHER.items() if name != "resume"}
    assert call("--config", str(tmp_path / "config.yaml")) == again


def test_an_option_goes_before_the_files_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 2e-3\nseed: 4\npacking: true\n")
    found = call("--config", str(tmp_path / "a.yaml"), "--seed", "5", "--no-packing")
    assert found == {"lr": 2e-3, "seed": 5, "packing": False}
    assert call() == {}


def test_init_takes_its_share_of_the_list() -> None:
    made = cli.command(print, [(Settings, True), (InitSettings, False)], {"output": "runs/init"})
    names = set(inspect.signature(made).parameters)
    own = {one.name for one, _ in listed(InitSettings)}
    assert own == {"strategy", "memory_budget", "cache", "stability", "energy", "parameters"}
    assert own < names
    assert names - own - {"config"} == {one.name for one, _ in listed(Settings) if one.metadata["init"]}
    assert "eval_data" not in names
    assert "run" in get_type_hints(InitSettings)


@pytest.mark.parametrize("kind", ["--help", "--help-all"])
def test_help_has_every_option_whole_in_eighty_columns(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = CliRunner().invoke(app, ["finetune", kind]).output
    assert "…" not in text
    folded = [one for one, _ in listed(Settings) if not one.metadata.get("main")]
    for one, _ in listed(Settings):
        assert f"{option(one.name)}" in text
    assert 12 <= len(list(listed(Settings))) - len(folded) <= 14
    explained = text.replace("\n", " ").partition("Most used")[2]
    for one in folded:
        assert (f"─ {one.metadata['group'].capitalize()} ─" in explained) == (kind == "--help-all")
    assert len(text.splitlines()) < 80 or kind == "--help-all"
    assert CliRunner().invoke(app, ["finetune", "--help"]).output == text or kind == "--help-all"  # folded again


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["--packing", "true"], True),
        (["--packing", "false"], False),
        (["--no-packing"], False),
        (["--packing", "True", "--seed", "3"], True),
    ],
)
def test_a_switch_takes_a_value_as_well(given: list[str], want: bool) -> None:
    assert call(*given)["packing"] is want


def test_options_names_and_aliases_are_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("learning-rate: 3e-4\nrank: 8\n--batch-size: 4\nepochs: auto\n")
    assert call("--config", str(file)) == {"lr": 3e-4, "r": 8, "batch_size": 4, "epochs": None}


def test_a_file_of_settings_runs_no_code_unless_that_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("rl: reward.py:score\n")
    with pytest.raises(
        ValueError, match=r"rl is reward.py:score, and the run would execute that file: add --allow-code"
    ):
        call("--config", str(file))
    assert call("--config", str(file), "--allow-code") == {"rl": "reward.py:score"}
    assert call("--config", str(file), "--rl", "other.py:score")["rl"] == "other.py:score"
    file.write_text("rl: exact\n")
    assert call("--config", str(file)) == {"rl": "exact"}


@pytest.mark.parametrize(
    ("given", "want"), [(["--no-packing", "--packing"], True), (["--packing", "--no-packing"], False)]
)
def test_the_last_of_a_switch_s_two_options_wins(given: list[str], want: bool) -> None:
    assert call(*given)["packing"] is want
    text = CliRunner().invoke(app, ["finetune", "--help"]).output
    assert "--no-packing" not in text
    assert "--no-NAME" in text
    assert call(*given)["packing"] is want  # the help has left the options as they are


@pytest.mark.parametrize("reward", ["evil.so:reward", "a.PY:f", "module:f"])
def test_whatever_is_no_reward_of_ours_needs_the_flag(tmp_path: Path, reward: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"rl: {reward}\n")
    with pytest.raises(ValueError, match="add --allow-code"):
        call("--config", str(file))


def test_a_config_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has the default task beside the file that was trained on."""
    file = tmp_path / "x.yaml"
    file.write_text("task: word_sequence_reversal\ndata: rows.jsonl\nepochs: 1.0\n")
    assert call("--config", str(file)) == {"data": "rows.jsonl", "epochs": 1.0}
    file.write_text("task: gcd\ndata: rows.jsonl\n")
    with pytest.raises(ValueError, match="--task gcd names generated examples"):
        Settings(**call("--config", str(file))).check()


@pytest.mark.parametrize("name", ["lr", "warmup", "temperature", "weight_decay"])
def test_auto_is_a_value_of_few_settings(tmp_path: Path, name: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"{name}: auto\n")
    with pytest.raises(ValueError, match="expects a value, got auto, which --epochs and --eta take"):
        Settings(**call("--config", str(file))).check()
