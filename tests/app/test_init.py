"""`lorasb init` and `lorasb inspect` of its cache, in this process, on a tiny model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

import lorasb
from lorasb.app.cli import app

PICTURES = ("energy.png", "ranks.png", "spectrum.png")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"})


def init(model: Path, examples: Path, output: Path, *more: object) -> Any:
    given = {"--model": model, "--data": examples, "--output": output, "--r": 8, "--batch-size": 4, "--samples": 8}
    return call("init", *itertools.chain(*given.items()), "--dtype", "float32", *more)


def test_it_writes_an_adapter_a_report_and_pictures(tiny: Path, data: Path, tmp_path: Path) -> None:
    done = init(tiny, data, tmp_path / "run", "--stability", "--energy", 0.5, "--cache", tmp_path / "signs.safetensors")
    assert done.exit_code == 0, done.output
    assert "lorasb: layerwise (2 blocks at model.layers)" in done.output
    assert "overlap of two halves of the samples" in done.output
    assert "suggested ranks: keeps" in done.output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"adapter", "report.json", "ranks.json", "config.yaml", *PICTURES}
    for name in PICTURES:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    report = lorasb.InitReport.load(tmp_path / "run" / "report.json")
    assert report.num_samples == 8
    assert 0 < report.stability <= 1
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    pattern = json.loads((tmp_path / "run" / "ranks.json").read_text())["rank_pattern"]
    again = lorasb.patch(base, r=8, rank_pattern=pattern)
    assert {m.r["default"] for m in again.modules() if isinstance(m, lorasb.LoRASBLinear)} == set(pattern.values())
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter")
    assert all(m.is_initialized("default") for m in loaded.modules() if isinstance(m, lorasb.LoRASBLinear))


def test_another_rank_from_the_cache_and_a_look_at_it(tiny: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "signs.safetensors"
    first = init(tiny, data, tmp_path / "a", "--cache", cache)
    second = init(tiny, data, tmp_path / "b", "--cache", cache, "--r", 16)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert "no backward" in second.output.replace("\n", " ")
    shown = call("inspect", cache)
    assert shown.exit_code == 0, shown.output
    assert "signs of the first full step, for any rank" in shown.output
    assert "down_proj" in shown.output
    assert f"{2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96):,}" in shown.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "fast"), "strategy must be one of auto, layerwise, accumulate, got 'fast'"),
        (("--energy", 2), "--energy is a share in"),
        (("--energy", 0.5, "--parameters", 100), "two ways to choose ranks"),
        (("--parameters", 0), "--parameters must be positive, got 0"),
        (("--memory-budget", "lots"), "expected a size like '6GB' or a number of bytes, got 'lots'"),
        (("--samples", 1000), "num_samples=1000, but the batches hold"),
        (("--update", "sgd", "--cache", "x.safetensors"), "update='sgd' needs the gradient itself"),
    ],
)
def test_bad_options(tiny: Path, data: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    done = init(tiny, data, tmp_path / "run", *options)
    assert done.exit_code != 0
    assert message in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_inspecting_another_file(tmp_path: Path) -> None:
    save_file({"words": torch.ones(3, 3)}, tmp_path / "bits.safetensors")
    done = call("inspect", tmp_path / "bits.safetensors")
    assert "is no cache of lorasb's initialization" in str(done.exception)
