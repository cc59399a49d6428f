"""Files that lorasb 0.1.0 and 0.2.0 wrote load to the bit; `tests/data/v0.1.0` has the base model of all of them."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from gradients import factors
from safetensors.torch import load_file

import lorasb
from lorasb.init import cache as caches
from lorasb.layers.lookup import adapted_layers

FILES = Path(__file__).parents[1] / "data" / "v0.1.0"
LATER_FILES = FILES.parent / "v0.2.0"
LAYERS = 14  # in two Llama blocks


def base() -> torch.nn.Module:
    """The base model of the files."""
    return transformers.LlamaForCausalLM.from_pretrained(FILES / "base")


def samples() -> list[dict[str, torch.Tensor]]:
    """The samples that the adapter was initialized from."""
    ids = load_file(FILES / "samples.safetensors")["input_ids"]
    return [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in ids[:, None]]


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The factors in a model, by their names in a file."""
    return {name.replace(".default", ""): value for name, value in factors(model).items()}


@pytest.mark.parametrize("folder", ["adapter", "initialized", "checkpoint-4"])
def test_an_adapter_loads_to_the_bit(folder: str) -> None:
    files = (FILES / folder).glob("*.safetensors")
    want = {name: value for file in files for name, value in load_file(file).items()}
    found = tensors(peft.PeftModel.from_pretrained(base(), FILES / folder))
    assert len(found) == 3 * LAYERS
    for name, value in found.items():
        assert torch.equal(value, want[name]), name


def test_an_option_that_a_file_lacks_can_be_given() -> None:
    """PEFT passes on only keywords that are annotated in the configuration's class."""
    model = peft.PeftModel.from_pretrained(base(), FILES / "adapter", wide_factors=True)
    assert all(layer.adapters["default"].wide_factors for layer in adapted_layers(model)[1].values())


@pytest.mark.parametrize(
    ("folder", "made", "targets"), [(FILES, "initialized", None), (LATER_FILES, "basis", ["q_proj"])]
)
def test_a_cache_gives_the_same_factors(
    folder: Path, made: str, targets: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key, facts = caches.read(folder / "signs.safetensors")
    assert facts["num_samples"] == 4
    others = {name: version for name, version in key["versions"].items() if name != "lorasb"}
    assert key["versions"]["lorasb"] != lorasb.__version__
    ours = caches.versions() | others  # a cache is refused under another torch; only lorasb's version differs here
    monkeypatch.setattr(caches, "versions", lambda: ours)
    cache = Path(shutil.copy(folder / "signs.safetensors", tmp_path))
    model = lorasb.patch(base(), r=2, target_modules=targets)
    assert lorasb.initialize(model, samples(), lr=1e-2, cache=cache, progress=False).strategy == "cache"
    want = load_file(folder / made / "adapter_model.safetensors")
    found = tensors(model)
    assert len(found) == 3 * (2 if targets else LAYERS)
    for name, value in found.items():
        scale = want[name].abs().max()
        assert (value - want[name]).abs().max() <= 1e-4 * scale, name  # another BLAS may sum in another order


def test_a_report_loads() -> None:
    report = lorasb.InitReport.load(FILES / "report.json")
    assert len(report.layers) == LAYERS
    assert 0.5 < report.energy_sign < 1.0


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_of_an_embedding_and_ranks_by_layer_load_to_the_bit() -> None:
    want = load_file(LATER_FILES / "embedding" / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(base(), LATER_FILES / "embedding")
    found = tensors(model)
    assert len(found) == 9
    assert all(torch.equal(value, want[name]) for name, value in found.items())
    layers = adapted_layers(model)[1]
    assert sorted(layer.r["default"] for layer in layers.values()) == [2, 2, 3]
    states = [state for layer in layers.values() for state in layer.adapters.values()]
    assert all(state.lora_dropout == 0.1 and state.equivalent_gradient for state in states)


def test_adapters_on_a_basis_load_to_the_bit() -> None:
    model = peft.PeftModel.from_pretrained(base(), LATER_FILES / "basis")
    for name in ("one", "two"):
        model.load_adapter(LATER_FILES / "basis" / name, name)
        want = load_file(LATER_FILES / "basis" / name / "adapter_model.safetensors")
        assert want  # R alone
        for path, layer in adapted_layers(model, name)[1].items():
            assert torch.equal(layer.lorasb_R[name], want[f"base_model.model.{path}.lorasb_R"])
            assert layer.lorasb_A[name] is layer.lorasb_A["default"]
