"""Models that cannot be adapted or trained as they are: each does the sensible thing, or says what to do in one line."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from adapters import layers
from models import Rows, make, text
from torch import nn

import lorasb

BATCHES = [text(1, 8, seed) for seed in range(2)]
LORA = peft.LoraConfig(r=4, target_modules=["q_proj"])


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_a_compiled_model_is_patched_first(way: str) -> None:
    model = make("llama")
    compiled = torch.compile(model, backend="eager") if way == "torch.compile" else model
    if way == "model.compile":
        model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"not compiled yet.*torch\.compile\(lorasb\.patch\(model\)\)"):
        lorasb.patch(compiled)
    assert not layers(model)


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_a_patched_model_may_be_initialized_after_it_was_compiled(way: str) -> None:
    plain, model = lorasb.patch(make("llama"), r=4), lorasb.patch(make("llama"), r=4)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter) if way == "torch.compile" else model
    if way == "model.compile":
        model.compile(backend=counter)
    lorasb.initialize(compiled, BATCHES, lr=1e-3, progress=False)
    assert counter.frame_count == 0
    lorasb.initialize(plain, BATCHES, lr=1e-3, progress=False)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_adapters_of_different_kinds_do_not_mix() -> None:
    model = lorasb.patch(make("llama"), r=4)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("second", LORA)
    with pytest.raises(ValueError, match="different peft types"):
        peft.get_peft_model(make("llama"), LORA).add_adapter("second", lorasb.LoRASBConfig(r=4))
    with pytest.raises(ValueError, match=r"without adapters.*add_adapter"):
        lorasb.patch(peft.get_peft_model(make("llama"), LORA))
    with pytest.raises(ValueError, match="PeftMixedModel"):
        peft.get_peft_model(make("llama"), lorasb.LoRASBConfig(r=4), mixed=True)


def test_nothing_that_requires_a_gradient(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=4).requires_grad_(False)
    with pytest.warns(UserWarning, match=r"nothing of it will train.*model\.set_adapter\('default'\)"):
        lorasb.initialize(model, BATCHES, lr=1e-3, progress=False)
    with pytest.raises(ValueError, match=r"no parameter requires a gradient.*set_adapter"):
        lorasb.parameter_groups(model, lr=1e-3)
    frozen = lorasb.patch(make("llama"), r=4).requires_grad_(False)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = transformers.Trainer(frozen, arguments, train_dataset=Rows(), callbacks=[lorasb.InitCallback()])
    with pytest.raises(ValueError, match=r"nothing would train: model\.set_adapter\('default'\)"):
        trainer.train()


def test_factors_lie_where_their_layer_does() -> None:
    """A model on several devices: here one block is on the meta device."""
    base = make("llama")
    base.model.layers[1].to("meta")
    model = lorasb.patch(base, r=4)
    for layer in layers(model).values():
        assert len({p.device for p in (layer.base_layer.weight, *layer.parameters())}) == 1


def test_a_block_on_another_device_gets_its_input_there() -> None:
    """Initialization moves a block's recorded inputs as the model's own forward does, by accelerate's hooks."""
    plain, model = lorasb.patch(make("llama"), r=4), lorasb.patch(make("llama"), r=4)
    blocks: nn.ModuleList = model.get_base_model().model.layers
    for block in blocks:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for each in (plain, model):
        lorasb.initialize(each, BATCHES, lr=1e-3, progress=False)
    ours, theirs = ([p for name, p in each.named_parameters() if "lorasb_" in name] for each in (model, plain))
    assert all(map(torch.equal, ours, theirs))
    assert len(ours) == len(theirs) > 0
