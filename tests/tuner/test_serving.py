"""Swapping a finished adapter into a running model with PEFT's hotswapping."""

from pathlib import Path
from typing import Any

import peft
import pytest
import tolerances
import torch
from adapters import layers, unchanged
from basis_models import fill
from models import batches_for, logits, make, patched
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tolerances import EXACT, check

import lorasb


def swap(model: Any, folder: Path, name: str = "default") -> None:
    hotswap_adapter(model, str(folder), adapter_name=name, torch_device="cpu")


def test_an_export_is_swapped_into_a_running_model(tmp_path: Path) -> None:
    first, other = patched(), lorasb.patch(make("llama"), r=4)
    lorasb.initialize(other, batches_for("llama")[1:], lr=5e-2, progress=False)
    for name, model in (("first", first), ("second", other)):
        lorasb.export_lora(model, tmp_path / name, quiet=True)
    running = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(running, target_rank=4)
    tolerances.check(logits(running), logits(first), tolerances.EXPORT)
    swap(running, tmp_path / "second")
    tolerances.check(logits(running), logits(other), tolerances.EXPORT)
    assert (logits(first) - logits(other)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base: `first`, and `second` with another initialization and scaling."""
    folder = tmp_path_factory.mktemp("saved")
    patched().save_pretrained(folder / "first")
    second = lorasb.patch(make("llama"), r=4, init="kaiming", scaling=0.5, equivalent_gradient=True)
    second.save_pretrained(folder / "second")
    return folder


def loaded(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(make("llama"), folder).eval()


def test_a_swapped_adapter_is_the_other_one_in_the_same_parameters_and_is_saved(saved: Path, tmp_path: Path) -> None:
    model, want = loaded(saved / "first"), logits(loaded(saved / "second"))
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert (logits(model) - want).abs().max() > 1e-3
    swap(model, saved / "second")
    check(logits(model), want, EXACT)
    assert model.peft_config["default"].equivalent_gradient
    assert all(layer.adapters["default"].equivalent_gradient for layer in layers(model).values())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    model.save_pretrained(tmp_path / "again")
    check(logits(loaded(tmp_path / "again")), want, EXACT)
    swap(model, saved / "first")
    check(logits(model), logits(loaded(saved / "first")), EXACT)


def test_what_was_trained_in_full_is_not_swapped_silently(tmp_path: Path) -> None:
    for name in "ab":
        lorasb.patch(make("bert"), r=3, init="random").save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(make("bert"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"more than A, R and B .*load_adapter"):
        swap(model, tmp_path / "b")


def test_a_compiled_model_is_swapped_without_compiling_again(saved: Path, tmp_path: Path) -> None:
    model = loaded(saved / "first")
    second = patched("llama")
    fill(second, "default", 0)
    second.save_pretrained(tmp_path / "third")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        logits(compiled)
        frames = counter.frame_count
        swap(compiled, tmp_path / "third")
        found = logits(compiled)
    assert counter.frame_count == frames
    check(found, logits(loaded(tmp_path / "third")).detach(), EXACT)


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        (0, {"r": 3}, r"does not fit the loaded adapter 'default'.*expected \[4, 64\]"),
        (0, {"target_modules": ["q_proj"]}, r"does not fit the loaded adapter 'default'.*no lorasb_A for layer"),
        (1, {}, "made on another base model"),
    ],
)
def test_another_rank_other_layers_and_another_base_are_refused(
    saved: Path, tmp_path: Path, seed: int, options: dict[str, Any], message: str
) -> None:
    lorasb.patch(make("llama", seed), **{"r": 4, "init": "random"} | options).save_pretrained(tmp_path / "other")
    model = loaded(saved / "first")
    with unchanged(model), pytest.raises(ValueError, match=message):
        swap(model, tmp_path / "other")


def test_a_merged_adapter_and_a_missing_one_are_refused(saved: Path) -> None:
    model = loaded(saved / "first")
    with pytest.raises(ValueError, match="no layer has an adapter 'nobody'"):
        swap(model, saved / "second", "nobody")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights: call model\.unmerge_adapter\(\)"):
        swap(model, saved / "second")
