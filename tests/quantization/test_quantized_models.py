"""Models in 4 and 8 bits, bitsandbytes' and our own: initialized, trained, saved, exported, merged as their dense twins."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import Rows, four_steps, loss_and_gradients
from quantized_models import KINDS, batches, dense_twin, factors, initialized, quantized
from tolerances import EXACT, EXPORT, MERGE, PROCESS_SUMS, check
from torch import nn

import lorasb
from lorasb.layers.linear import LoRASBLinear


def adapted(model: nn.Module) -> list[LoRASBLinear]:
    return [module for module in model.modules() if isinstance(module, LoRASBLinear)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_its_dequantized_twin_in_forward_and_gradients(kind: str) -> None:
    base = quantized(kind)
    twin, model = lorasb.patch(dense_twin(base), r=4), lorasb.patch(base, r=4)
    lorasb.initialize(twin, batches(), lr=1e-2, progress=False)
    for layer, other in zip(adapted(model), adapted(twin), strict=True):
        layer.set_factors("default", other.lorasb_B["default"], other.lorasb_R["default"], other.lorasb_A["default"])
    results = [loss_and_gradients(each, batches()[0]) for each in (model, twin)]
    for one, other in zip(*results, strict=True):
        check(one, other, PROCESS_SUMS)


@pytest.mark.parametrize("kind", KINDS)
def test_both_strategies_give_the_same_factors(kind: str) -> None:
    one, other = (initialized(kind, strategy=strategy) for strategy in ("layerwise", "accumulate"))
    for first, second in zip(factors(one), factors(other), strict=True):
        check(first, second, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_take_turns_and_the_storage_stays(kind: str) -> None:
    model = initialized(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    assert any("SCB" in name or "absmax" in name for name in before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    batch, losses = batches()[0], []
    for _ in range(6):
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            model(**batch)
            with model.disable_adapter():
                model(**batch)
    assert losses[-1] < losses[0] - 0.1
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["own nested", "nf4", "int8"])
def test_a_resumed_trainer_ends_in_the_same_factors(kind: str, tmp_path: Path) -> None:
    arguments, done = four_steps(tmp_path), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = initialized(kind)
        transformers.Trainer(model=model, args=arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
        done.append(factors(model))
    for first, second in zip(*done, strict=True):
        check(first, second, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_saved_loaded_and_exported(kind: str, tmp_path: Path) -> None:
    model = initialized(kind).eval()
    want = model(**batches()[0]).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(kind), tmp_path / "adapter").eval()
    check(again(**batches()[0]).logits, want, EXACT)
    lorasb.export_lora(model, tmp_path / "lora", quiet=True)
    plain = peft.PeftModel.from_pretrained(dense_twin(quantized(kind)), tmp_path / "lora").eval()
    check(plain(**batches()[0]).logits, want, EXPORT)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_dense_layers_and_unmerging_the_storage_back(kind: str) -> None:
    model = initialized(kind).eval()
    want, bases = model(**batches()[0]).logits, [layer.base_layer for layer in adapted(model)]
    model.merge_adapter()
    check(model(**batches()[0]).logits, want, MERGE)
    model.unmerge_adapter()
    assert [layer.base_layer for layer in adapted(model)] == bases
    check(model(**batches()[0]).logits, want, EXACT)
    merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    check(merged(**batches()[0]).logits, want, MERGE)


def test_a_merge_that_is_not_finite_leaves_the_storage() -> None:
    model = initialized("nf4")
    layer = adapted(model)[0]
    base = layer.base_layer
    layer.lorasb_R["default"].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload()
    assert layer.base_layer is base
    assert not layer.merged
