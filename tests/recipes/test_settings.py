"""The one list of settings: as options, as YAML, and held against its own rules."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
import yaml
from typer.testing import CliRunner

from lorasb.cli import options
from lorasb.recipes import config_file
from lorasb.recipes.settings import DTYPES, SCHEDULERS, UPDATES, InitSettings, Settings, listed

KNOWN = {one.name: kind for one, kind in listed(Settings)}
OTHER = {
    "model": "folder", "dtype": "float32", "bits": 4, "task": "gcd", "data": "a.jsonl", "eval_data": "b.jsonl",
    "train_examples": 7, "eval_examples": 8, "max_length": 9, "packing": True, "method": "lora-xs", "r": 3,
    "target_modules": "q_proj,v_proj", "rank_pattern": {"down_proj": 2}, "samples": 5, "update": "sgd", "lr": 1e-5,
    "epochs": 2.5, "batch_size": 6, "gradient_accumulation": 2, "gradient_checkpointing": True, "scheduler": "cosine",
    "warmup": 0.2, "weight_decay": 0.01, "seed": 11, "eval_steps": 12, "save_steps": "13", "resume": "never",
    "report_to": "wandb", "output": "elsewhere",
}  # fmt: skip


def call(*arguments: str) -> dict[str, Any]:
    """What a command with these arguments would run with."""
    got: list[dict[str, Any]] = []
    app = typer.Typer()
    app.command()(options.command(got.append, [(Settings, False)], {}))
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return got[0]


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


def test_defaults_of_the_file_are_the_lists(tmp_path: Path) -> None:
    config_file.write_config(tmp_path / "a.yaml", Settings())
    assert Settings(**config_file.read_config(tmp_path / "a.yaml", KNOWN)) == Settings()
    assert set(yaml.safe_load((tmp_path / "a.yaml").read_text())) == set(KNOWN) - {"resume"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", r"there is no setting 'learning_rate': (did you mean|known are)"),
        ("batchsize: 4", r"there is no setting 'batchsize': did you mean 'batch_size'\?"),
        ("batch-sizes: 4", r"there is no setting 'batch-sizes': did you mean 'batch_size'\?"),
        ("lr: fast", "lr expects a number, got 'fast'"),
        ("seed: 1.5", "seed expects a whole number, got 1.5"),
        ("seed: true", "seed expects a whole number, got True"),
        ("packing: 3", "packing expects true or false, got 3"),
        ("model: [a]", r"model expects a text, got \['a'\]"),
        ("rank_pattern: 3", "rank_pattern expects ranks by name, like down_proj=96,q_proj=32 or JSON, got 3"),
        ("- a", "expected lines like `lr: 0.002`, got list"),
        ("a: [", "this is no YAML"),
        ("!!python/object/apply:os.getcwd []", "this is no YAML"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"--config .*a.yaml: {message}"):
        config_file.read_config(tmp_path / "a.yaml", KNOWN)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a YAML file of settings"):
        config_file.read_config(tmp_path / "none.yaml", KNOWN)


@pytest.mark.parametrize("text", ["down_proj=96,q_proj=32", '{"down_proj": 96, "q_proj": 32}'])
def test_ranks_by_name(text: str) -> None:
    assert config_file.typed(text, dict[str, int], "x") == {"down_proj": 96, "q_proj": 32}


@pytest.mark.parametrize("text", ["down_proj", "down_proj=x", '{"a": "b"}', "{", "[1]"])
def test_what_is_no_ranks(text: str) -> None:
    with pytest.raises(ValueError, match="--rank-pattern expects ranks by name"):
        config_file.typed(text, dict[str, int], "--rank-pattern")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": "warp"}, "--scheduler must be one of linear, cosine"),
        ({"report_to": "paper"}, "--report-to must be one of none, tensorboard, wandb"),
        ({"save_steps": "often"}, "--save-steps must be auto or a positive number of steps, got 'often'"),
        ({"save_steps": "0"}, "--save-steps must be auto or a positive number"),
        ({"warmup": 1.0}, r"--warmup is a share of the steps in \[0, 1\), got 1.0"),
        ({"bits": 8}, "--bits must be 4 or 16, got 8"),
        ({"weight_decay": -1.0}, "--weight-decay must not be negative"),
        ({"rank_pattern": {"q": 0}}, "--rank-pattern must have positive ranks"),
        ({"eval_steps": 0}, "--eval-steps must be positive, got 0"),
        ({"gradient_accumulation": 3}, "--batch-size 16 cannot be parted in --gradient-accumulation 3 equal parts"),
        ({"lr": float("nan")}, "--lr must be positive, got nan"),
    ],
)
def test_values_that_no_run_can_have(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values).check()


def test_choices_are_the_librarys() -> None:
    from transformers import SchedulerType

    from lorasb.init import initialization
    from lorasb.utils import precision

    assert initialization.UPDATES == UPDATES
    assert set(DTYPES) == {"auto", *precision.DTYPES}
    assert set(SCHEDULERS) <= {one.value for one in SchedulerType}


def test_init_takes_its_share_of_the_list() -> None:
    made = options.command(print, [(Settings, True), (InitSettings, False)], {"output": "runs/init"})
    names = set(inspect.signature(made).parameters)
    own = {one.name for one, _ in listed(InitSettings)}
    assert own == {"strategy", "memory_budget", "cache", "stability", "energy", "parameters"}
    assert own < names
    assert names - own - {"config"} == {one.name for one, _ in listed(Settings) if one.metadata["init"]}
    assert "eval_data" not in names
    assert "run" in get_type_hints(InitSettings)
