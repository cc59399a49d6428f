"""Presets: each is a whole run's settings, those of the paper's Table 11, and an option or a file goes before them."""

from __future__ import annotations

from pathlib import Path

import pytest
from parsed_options import call

from lorasb.app import cli, config_file
from lorasb.app.config_file import read_config
from lorasb.app.data import NAMED
from lorasb.app.settings import Settings, listed

KNOWN = {one.name: kind for one, kind in listed(Settings)}
# Table 11: batch size, accumulation, length, epochs, dropout, learning rate, schedule, warm-up
TABLE_11 = {
    "metamath-mistral-7b": (32, 32, 512, 1, 0.0, 1e-4, "cosine", 0.02),
    "metamath-gemma-2-9b": (32, 32, 512, 1, 0.0, 1e-4, "cosine", 0.02),
    "commonsense-llama-3.2-3b": (144, 24, 256, 2, 0.05, 2e-3, "linear", 0.02),
}


# Table 12: epochs; the rest is the same for all
TABLE_12 = {"cola": 30, "rte": 30, "mrpc": 30, "sst2": 15, "qnli": 15, "stsb": 30}


def test_every_table_has_its_presets() -> None:
    assert set(config_file.preset_names()) == {*TABLE_11, *(f"{task}-roberta-large" for task in TABLE_12)}


@pytest.mark.parametrize("name", config_file.preset_names())
def test_a_preset_is_a_run(name: str) -> None:
    settings = Settings(**call("--preset", name))
    settings.check()
    assert settings.output == f"runs/{name}"
    assert {settings.data, *(settings.eval_data or "gsm8k").split(",")} <= set(NAMED)


@pytest.mark.parametrize("name", TABLE_11)
def test_a_preset_has_the_papers_settings(name: str) -> None:
    one = Settings(**call("--preset", name))
    found = one.batch_size, one.gradient_accumulation, one.max_length, one.epochs, one.lora_dropout, one.lr
    assert (*found, one.scheduler, one.warmup) == TABLE_11[name]


@pytest.mark.parametrize("task", TABLE_12)
def test_a_glue_preset_has_the_papers_settings(task: str) -> None:
    one = Settings(**call("--preset", f"{task}-roberta-large"))
    found = one.batch_size, one.max_length, one.lora_dropout, one.lr, one.scheduler, one.warmup
    assert (one.epochs, *found) == (TABLE_12[task], 128, 256, 0.0, 1e-3, "linear", 0.06)


def test_options_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("r: 8\nseed: 4\n")
    found = call("--preset", "metamath-mistral-7b", "--config", str(tmp_path / "a.yaml"), "--seed", "5")
    expected = read_config(config_file.find_preset("metamath-mistral-7b"), KNOWN) | {"r": 8, "seed": 5}
    assert found == expected


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"--preset 'metamath-mistral': there is no such preset: did you mean 'metamath-m"
    ):
        config_file.find_preset("metamath-mistral")
    with pytest.raises(ValueError, match="known are cola-roberta-large, "):
        config_file.find_preset("qqq")


def test_presets_are_not_for_init() -> None:
    import inspect

    from lorasb.app.settings import InitSettings

    made = cli.command(print, [(Settings, True), (InitSettings, False)], {})
    assert "preset" not in inspect.signature(made).parameters
