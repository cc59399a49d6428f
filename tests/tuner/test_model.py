"""A patched model: several adapters, on and off, merged and unmerged, dtypes, and failures that change nothing."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tolerances
import torch
from adapters import layers, trained
from models import batches_for, logits, make, patched

import lorasb


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_stay_fp32_for_r_after_patch_load_and_add_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    model = patched(dtype=dtype)
    model.save_pretrained(tmp_path)
    model.add_adapter("second", lorasb.LoRASBConfig(r=2))
    model.load_adapter(tmp_path, "third", is_trainable=True)
    options = {"is_trainable": True}
    loaded = peft.PeftModel.from_pretrained(make("llama", dtype=dtype), tmp_path, **options)
    lazy = peft.PeftModel.from_pretrained(make("llama", dtype=dtype), tmp_path, low_cpu_mem_usage=True, **options)
    for candidate in (model, loaded, lazy):
        for name, parameter in candidate.named_parameters():
            if "lorasb_R" in name:
                assert parameter.dtype == torch.float32, name
            else:
                assert not parameter.requires_grad, name
                assert parameter.dtype == dtype, name
    assert {n.rpartition(".")[2] for one in (loaded, lazy) for n in trained(one)} == {"default"}
    assert trained(loaded) == trained(lazy)


def test_adapters_take_turns_and_fail_and_are_deleted_without_touching_one_another() -> None:
    model = patched()
    first, names = logits(model), trained(model)
    with pytest.raises(ValueError, match="rank 40 is more than layer"):
        model.add_adapter("second", lorasb.LoRASBConfig(r=40))
    assert (trained(model), list(model.peft_config)) == (names, ["default"])
    assert torch.equal(logits(model), first)
    model.add_adapter("second", lorasb.LoRASBConfig(r=2, target_modules=["q_proj", "up_proj"]))
    lorasb.initialize(model, batches_for("llama"), lr=3e-2, adapter_name="second", progress=False)
    tolerances.check(logits(model), first, tolerances.EXACT)
    model.set_adapter("second")
    second = logits(model)
    assert (second - first).abs().max() > 1e-3
    assert all("second" in name for name in trained(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name in trained(model))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(("call", "value"), [("merge_adapter", float("nan")), ("merge_and_unload", float("inf"))])
def test_one_broken_layer_leaves_every_weight_as_it_was(call: str, value: float, safe: bool) -> None:
    model = patched()
    found = list(layers(model).values())
    before = [layer.base.parameter().detach().clone() for layer in found]
    with torch.no_grad():
        found[-1].lorasb_R["default"][0, 0] = value
    message = r"layers\.1\.mlp\.down_proj: .*not finite in torch\.float32; the weights were left as they are"
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(safe_merge=safe)
    assert all(torch.equal(layer.base.parameter(), weight) for layer, weight in zip(found, before, strict=True))
    assert not any(layer.merged for layer in found)
    assert list(layers(model).values()) == found


def test_before_initialization_the_equivalent_gradient_changes_nothing_either() -> None:
    want = logits(make("llama"))
    model = lorasb.patch(make("llama"), r=4, equivalent_gradient=True).eval()
    assert torch.equal(logits(model), want)
    found = model(**batches_for("llama", count=1)[0])  # evaluation that keeps the graph
    assert torch.equal(found.logits.detach(), want)
    with pytest.raises(RuntimeError, match="has not been initialized"):
        found.loss.backward()


def test_a_merged_quantized_base_takes_what_it_took_before() -> None:
    model = lorasb.patch(lorasb.quantize(make("llama", dtype=torch.bfloat16)), r=4)
    lorasb.initialize(model, batches_for("llama"), lr=2e-2, progress=False)
    layer, x = next(iter(layers(model).values())), torch.randn(3, 64)
    before = layer(x)
    model.merge_adapter()
    assert layer(x).dtype == before.dtype == torch.float32
    tolerances.check(layer(x) / before.abs().max(), before / before.abs().max(), tolerances.HALF_FEW)
