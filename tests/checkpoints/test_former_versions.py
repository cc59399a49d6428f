"""Files that lorasb 0.1.0 wrote load to the bit: an adapter, one that was only initialized, a checkpoint, a cache.

`tests/data/v0.1.0` holds them, with the base model that they belong to.
"""

from __future__ import annotations

from pathlib import Path

import environment  # noqa: F401  before anything reads it
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lorasb
from lorasb.constants import FACTORS
from lorasb.init import provenance
from lorasb.init.cache import read

FILES = Path(__file__).parents[1] / "data" / "v0.1.0"
FACTOR_FILES = ("adapter", "initialized", "checkpoint-4")
LAYERS = 14  # of two Llama blocks


def base() -> torch.nn.Module:
    """The model that the files belong to."""
    return transformers.LlamaForCausalLM.from_pretrained(FILES / "base")


def samples() -> list[dict[str, torch.Tensor]]:
    """What the adapter was initialized from."""
    ids = load_file(FILES / "samples.safetensors")["input_ids"]
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids[:, None]]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The factors in a model, by their names in a file."""
    return {
        name.replace(".default", ""): value.detach()
        for name, value in model.named_parameters()
        if any(f".{factor}." in name for factor in FACTORS)
    }


@pytest.mark.parametrize("folder", FACTOR_FILES)
def test_an_adapter_loads_to_the_bit(folder: str) -> None:
    want = load_file(FILES / folder / "adapter_model.safetensors")
    if (FILES / folder / "lorasb_factors.safetensors").is_file():
        want |= load_file(FILES / folder / "lorasb_factors.safetensors")
    found = tensors(peft.PeftModel.from_pretrained(base(), FILES / folder))
    assert len(found) == 3 * LAYERS
    for name, value in found.items():
        assert torch.equal(value, want[name]), name


def test_a_trained_adapter_is_not_the_initialized_one() -> None:
    first, second = (load_file(FILES / name / "adapter_model.safetensors") for name in FACTOR_FILES[:2])
    assert all(torch.equal(first[name], value) == ("lorasb_R" not in name) for name, value in second.items())


def test_a_cache_gives_the_same_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, key, facts = read(FILES / "signs.safetensors")
    assert len(layers) == LAYERS
    assert key["versions"]["lorasb"] == "0.1.0"
    assert facts["num_samples"] == 4
    others = {name: version for name, version in key["versions"].items() if name != "lorasb"}
    ours = provenance.versions() | others  # a cache is refused under another torch: here lorasb's own version counts
    monkeypatch.setattr(provenance, "versions", lambda: ours)
    cache = tmp_path / "signs.safetensors"
    cache.write_bytes((FILES / "signs.safetensors").read_bytes())
    model = lorasb.patch(base(), r=2)
    report = lorasb.initialize(model, samples(), lr=1e-2, cache=cache, progress=False)
    assert "cache" in report.strategy + report.why
    want = load_file(FILES / "initialized" / "adapter_model.safetensors")
    for name, value in tensors(model).items():
        scale = want[name].abs().max()
        assert (value - want[name]).abs().max() <= 1e-4 * scale, name  # another BLAS may order its sums otherwise


def test_a_report_loads() -> None:
    report = lorasb.InitReport.load(FILES / "report.json")
    assert len(report.layers) == LAYERS
    assert 0.5 < report.energy_sign < 1.0
