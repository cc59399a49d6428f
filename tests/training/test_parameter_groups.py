"""Parameter groups: everything that trains is in one of them, R apart."""

from __future__ import annotations

import pytest
import torch
from models import batches_for, make, patched

import lorasb


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
