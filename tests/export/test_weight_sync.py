"""Adapter-only synchronization: the basis once, R after every step, and the plain LoRA on the other side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from models import EXPERTS, batches_for, logits, make, patched
from networks import Net
from safetensors.torch import load_file
from tolerances import EXPORT, check, check_equal

import lorasb


def served(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of stock PEFT with these tensors in a plain LoRA, layer by layer at its own rank."""
    factors = ((key.partition(".lora_A"), value) for key, value in tensors.items() if "lora_A" in key)
    ranks = {parts[0].removeprefix("base_model.model."): len(value) for parts, value in factors}
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)
    plain = peft.get_peft_model(make("llama"), config)
    found = peft.set_peft_model_state_dict(plain, tensors)
    assert not found.unexpected_keys
    return logits(plain.eval())


def test_the_other_side_computes_what_the_trainer_does_after_every_step() -> None:
    model = patched(scaling=0.5, rank_pattern={"k_proj": 2})
    base = {name: p.clone() for name, p in model.named_parameters() if "lorasb_R" not in name}
    basis = {name: value.clone() for name, value in lorasb.adapter_delta(model, "basis").items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()(**batches_for("llama")[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tensors = lorasb.lora_of(basis, lorasb.adapter_delta(model, "core"))
        check(served(tensors), logits(model.eval()), EXPORT)
        check_equal(lorasb.adapter_delta(model), tensors)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


SMALL = {"r": 3, "init": "kaiming"}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: patched(scaling=0.5),
    "mixtral": lambda: lorasb.patch(make("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS, **SMALL),
    "convolutions": lambda: lorasb.patch(Net(), target_modules=["embed", "conv", "image", "head"], **SMALL),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_is_what_the_export_writes(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    lorasb.export_lora(model, tmp_path, quiet=True)
    written, sent = load_file(tmp_path / "adapter_model.safetensors"), lorasb.adapter_delta(model)
    assert written.keys() == sent.keys()
    check([sent[name] for name in written], list(written.values()), EXPORT)


def test_a_step_of_a_7b_model_is_less_than_4_mb() -> None:
    """R alone: 4·r² bytes of each linear, here of two blocks at r = 4, there of 32 blocks at r = 64."""
    core = lorasb.adapter_delta(patched("llama", r=4), "core")
    size = sum(value.numel() * value.element_size() for value in core.values())
    assert size == 14 * 4 * 4**2
    assert size * 32 / 2 * (64 / 4) ** 2 <= 4 * 2**20
    half = lorasb.adapter_delta(patched("llama", r=4), "core", dtype=torch.bfloat16)
    assert {value.dtype for value in half.values()} == {torch.bfloat16}


def test_what_cannot_be_sent_is_refused() -> None:
    model = patched("llama")
    with pytest.raises(ValueError, match="part must be one of lora, basis, core, got 'all'"):
        lorasb.adapter_delta(model, "all")
    with pytest.raises(ValueError, match="has not been initialized"):
        lorasb.adapter_delta(lorasb.patch(make("llama"), r=4))
    core = lorasb.adapter_delta(model, "core")
    core.pop(next(iter(core)))
    with pytest.raises(ValueError, match="expected R of every layer of the basis"):
        lorasb.lora_of(lorasb.adapter_delta(model, "basis"), core)
