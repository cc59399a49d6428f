"""Hotswapping: another adapter's values into the parameters of a loaded one, by PEFT's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import logits, make, patched
from peft.utils.hotswap import hotswap_adapter
from tolerances import EXACT, check

import lorasb


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two adapters of one base: `first` and `second`, of another start and scaling."""
    for name, options in (("first", {}), ("second", {"init": "kaiming", "scaling": 0.5})):
        model = patched("llama", **options) if not options else lorasb.patch(make("llama"), r=4, **options)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def loaded(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(make("llama"), folder).eval()


def test_a_swapped_adapter_is_the_other_one_in_the_same_parameters(saved: Path) -> None:
    model, want = loaded(saved / "first"), logits(loaded(saved / "second"))
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert (logits(model) - want).abs().max() > 1e-3
    hotswap_adapter(model, str(saved / "second"), adapter_name="default", torch_device="cpu")
    check(logits(model), want, EXACT)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    hotswap_adapter(model, str(saved / "first"), adapter_name="default", torch_device="cpu")
    check(logits(model), logits(loaded(saved / "first")), EXACT)


def test_theorem_3_comes_with_the_swapped_adapter(saved: Path, tmp_path: Path) -> None:
    preconditioned = lorasb.patch(make("llama"), r=4, init="lora-xs", equivalent_gradient=True)
    preconditioned.save_pretrained(tmp_path / "third")
    model = loaded(saved / "first")
    hotswap_adapter(model, str(tmp_path / "third"), adapter_name="default", torch_device="cpu")
    layers = [module for module in model.modules() if isinstance(module, lorasb.LoRASBLinear)]
    assert model.peft_config["default"].equivalent_gradient
    assert all(layer.adapters["default"].equivalent for layer in layers)


def test_what_was_swapped_in_is_what_is_saved(saved: Path, tmp_path: Path) -> None:
    model = loaded(saved / "first")
    hotswap_adapter(model, str(saved / "second"), adapter_name="default", torch_device="cpu")
    model.save_pretrained(tmp_path / "again")
    check(logits(loaded(tmp_path / "again")), logits(loaded(saved / "second")), EXACT)


def test_what_was_trained_in_full_is_not_swapped_silently(tmp_path: Path) -> None:
    for name in "ab":
        lorasb.patch(make("bert"), r=3, init="random").save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(make("bert"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"more than A, R and B .*load_adapter"):
        hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")


def test_a_compiled_model_is_swapped_without_compiling_again(saved: Path, tmp_path: Path) -> None:
    model = loaded(saved / "first")
    second = patched("llama")
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "lorasb_R" in name:
                parameter.mul_(3)
    second.save_pretrained(tmp_path / "third")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        logits(compiled)
        frames = counter.frame_count
        hotswap_adapter(compiled, str(tmp_path / "third"), adapter_name="default", torch_device="cpu")
        found = logits(compiled)
    assert counter.frame_count == frames
    check(found, logits(loaded(tmp_path / "third")).detach(), EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 3}, r"does not fit the loaded adapter 'default'.*expected \[4, 64\]"),
        ({"r": 4, "target_modules": ["q_proj"]}, r"does not fit the loaded adapter 'default'.*no lorasb_A for layer"),
    ],
)
def test_other_ranks_and_layers_are_refused(saved: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    lorasb.patch(make("llama"), init="random", **options).save_pretrained(tmp_path / "other")
    model = loaded(saved / "first")
    want = logits(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    check(logits(model), want, EXACT)


def test_another_base_a_merged_adapter_and_a_missing_one_are_refused(saved: Path, tmp_path: Path) -> None:
    lorasb.patch(make("llama", seed=1), r=4, init="random").save_pretrained(tmp_path / "other")
    model = loaded(saved / "first")
    with pytest.raises(ValueError, match="made on another base model"):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    with pytest.raises(ValueError, match="no layer has an adapter 'nobody'"):
        hotswap_adapter(model, str(saved / "second"), adapter_name="nobody", torch_device="cpu")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights: call model\.unmerge_adapter\(\)"):
        hotswap_adapter(model, str(saved / "second"), adapter_name="default", torch_device="cpu")


def test_plain_loras_go_to_pefts_own_code(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(make("llama"), config).save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "a").eval()
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cpu")
    check(logits(model), logits(peft.PeftModel.from_pretrained(make("llama"), tmp_path / "b").eval()), EXACT)
