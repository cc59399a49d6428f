"""transformers.Trainer: training, checkpoints, resuming and parameter groups, in fp32, bf16 weights and bf16 autocast."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from models import batches_for, make, patched
from trainer_runs import train

import lorasb

KINDS = {
    "fp32": (torch.float32, {}),
    "bf16 weights": (torch.bfloat16, {}),
    "bf16 autocast": (torch.float32, {"bf16": True}),
    "gradient checkpointing": (torch.float32, {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_r_trains_and_resuming_continues_the_run(tmp_path: Path, kind: str) -> None:
    dtype, options = KINDS[kind]
    model = patched(dtype=dtype)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lorasb_R" not in n}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "lorasb_R" in n}
    train(model, tmp_path, [], **options)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
            assert parameter.dtype == dtype
        else:
            assert not torch.equal(parameter, start[name]), name
            assert parameter.dtype == torch.float32
    want = peft.get_peft_model_state_dict(model)
    resumed = patched(dtype=dtype)
    train(resumed, tmp_path, [], resume=str(tmp_path / "checkpoint-2"), **options)
    again = peft.PeftModel.from_pretrained(make("llama", dtype=dtype), tmp_path / "checkpoint-4")
    for other in (resumed, again):
        got = peft.get_peft_model_state_dict(other)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_the_loss_goes_down(tmp_path: Path) -> None:
    model = lorasb.patch(make("llama"), r=16)
    lorasb.initialize(model, batches_for("llama", count=6), lr=1e-3, progress=False)
    trainer = train(model, tmp_path, [], max_steps=120, save_strategy="no")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_an_uninitialized_model_is_refused_by_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"lorasb\.initialize\(model, dataloader, lr="):
        train(lorasb.patch(make("llama"), r=4), tmp_path, [])


def test_resuming_at_another_rank_is_refused(tmp_path: Path) -> None:
    train(patched(r=4), tmp_path, [])
    with pytest.raises(ValueError, match=r"lorasb_A of layer .* is \[4, 64\] in the adapter file, expected \[6, 64\]"):
        train(patched(r=6), tmp_path, [], resume=str(tmp_path / "checkpoint-2"))


def test_r_has_a_group_of_its_own() -> None:
    model = patched("roberta")
    groups = lorasb.parameter_groups(model, lr=1e-3, other_lr=1e-4, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lorasb_R", 1e-3, 0.0),
        ("other", 1e-4, 0.1),
        ("other, not decayed", 1e-4, 0.0),
    ]
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in groups[0]["params"]} == {id(p) for n, p in model.named_parameters() if "lorasb_R" in n}


def test_an_optimizer_takes_them() -> None:
    model = patched("llama").train()
    groups = lorasb.parameter_groups(model, lr=1e-2)
    assert [group["name"] for group in groups] == ["lorasb_R"]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(4):
        loss = model(**batches_for("llama")[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"no parameter requires a gradient: patch the model \(lorasb\.patch\)"):
        lorasb.parameter_groups(make("llama").requires_grad_(False), lr=1e-3)


def test_a_rate_of_zero_freezes_a_group() -> None:
    groups = lorasb.parameter_groups(lorasb.patch(make("roberta"), r=4, init="lora-xs"), lr=1e-3, other_lr=0.0)
    assert {group["lr"] for group in groups} == {1e-3, 0.0}
