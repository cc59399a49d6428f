"""Several tasks on one basis: the first steps of each, what the shared basis keeps, and errors that change nothing."""

from __future__ import annotations

import pytest
import torch
from basis_models import a_layer, base, with_users
from models import Batch, batches_for
from tolerances import EXPORT, check

import lorasb
from lorasb.layers.lookup import layers_with


def tasks() -> dict[str, list[Batch]]:
    return {"math": batches_for("llama")[:1], "code": batches_for("llama")[1:2]}


def test_each_task_has_the_projection_of_its_own_start() -> None:
    model = lorasb.patch(base(), r=4)
    report = lorasb.initialize(model, tasks(), lr=1e-3, progress=False)
    assert set(model.peft_config) == {"math", "code", "default"}
    assert model.active_adapters == ["default"]
    assert not a_layer(model).lorasb_R["default"].any()
    for task, batches in tasks().items():
        alone = lorasb.patch(base(), r=4)
        lorasb.initialize(alone, batches, lr=1e-3, progress=False)
        kept = total = 0.0
        for layer, module in layers_with(model, task).items():
            assert module.lorasb_A[task] is module.lorasb_A["default"]
            delta = layers_with(alone, "default")[layer].get_delta_weight("default").double()
            b, a = module.lorasb_B[task].double(), module.lorasb_A[task].double()
            check(module.lorasb_R[task], b.t() @ delta @ a.t(), EXPORT)
            kept += float((b.t() @ delta @ a.t()).square().sum())
            total += float(delta.square().sum())
        assert abs(report.shares.overall[task] - kept / total) < 1e-4
        assert report.tasks[task].num_samples == len(batches[0]["input_ids"])
    assert "the shared basis keeps\n  math: " in str(report)


def test_they_train_in_one_batch() -> None:
    model = lorasb.patch(base(), r=4)
    lorasb.initialize(model, tasks(), lr=1e-3, progress=False)
    model.base_model.set_adapter(["math", "code"])
    model.train()
    batch = batches_for("llama")[2]
    before = model(**batch, adapter_names=["math", "code"]).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch, adapter_names=["math", "code"]).loss
        loss.backward()
        optimizer.step()
    assert loss < before


def test_what_cannot_be_is_refused_and_leaves_the_model() -> None:
    model = lorasb.patch(base(), r=4)
    with pytest.raises(ValueError, match="two tasks or more, with names that no adapter has: got 1"):
        lorasb.initialize(model, {"math": batches_for("llama")}, lr=1e-3, progress=False)
    with pytest.raises(ValueError, match="an adapter 'default' is there already"):
        lorasb.initialize(model, {"default": [], "code": []}, lr=1e-3, progress=False)
    with pytest.raises(ValueError, match="expected a name without dots for each adapter"):
        lorasb.initialize(model, {"copy": [], "code": []}, lr=1e-3, progress=False)
    with pytest.raises(ValueError, match="initialize several tasks without it"):
        lorasb.initialize(model, tasks(), lr=1e-3, cache="signs.safetensors", progress=False)
    with pytest.raises(ValueError, match=r"takes batches and lr > 0"):
        lorasb.initialize(model, tasks(), progress=False)
    with pytest.raises(ValueError):  # noqa: PT011  of the second task, whatever it says
        lorasb.initialize(model, tasks() | {"code": []}, lr=1e-3, progress=False)
    based = with_users("ada")
    core, factor = a_layer(based).lorasb_R["ada"].clone(), a_layer(based).lorasb_A["ada"].clone()
    with pytest.raises(ValueError, match="'default' is the basis of ada, whose R would mean nothing"):
        lorasb.initialize(based, tasks(), lr=1e-3, adapter_name="default", progress=False)
    assert torch.equal(core, a_layer(based).lorasb_R["ada"])
    assert torch.equal(factor, a_layer(based).lorasb_A["ada"])
    assert list(model.peft_config) == ["default"]
    assert not a_layer(model).adapters["default"].initialized
