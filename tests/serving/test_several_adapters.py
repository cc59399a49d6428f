"""Several adapters trained in the same batches end where each ends alone: losses, clipping, AdamW's state and rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from basis_models import a_layer, with_users
from models import batches_for
from tolerances import FP64, check
from torch import Tensor

import lorasb
from lorasb.layers.lookup import layers_with

NAMES = ("ada", "emmy", "grace")
RATES = {"ada": 1e-2, "emmy": 3e-3, "grace": 1e-3}
NORM = 0.05  # clips all of them


def rows(step: int) -> tuple[dict[str, Tensor], list[str]]:
    """A batch of four rows, and whose they are; not everybody has some in every step."""
    one, other = (batches_for("llama")[(step + i) % 3] for i in range(2))
    batch = {name: torch.cat((one[name], other[name])) for name in one}
    owners = [["ada", "emmy", "ada", "grace"], ["grace", "ada", "__base__", "grace"], ["emmy", "emmy", "ada", "emmy"]]
    return batch, owners[step % 3]


def cores(model: Any, name: str) -> list[Tensor]:
    return [layer.lorasb_R[name].detach() for layer in layers_with(model, name).values()]


def train(model: Any, names: tuple[str, ...], steps: int = 6) -> None:
    """Of each batch the rows of some adapters."""
    model.train()
    optimizer = torch.optim.AdamW(lorasb.adapter_parameter_groups(model, names, RATES, weight_decay=0.01))
    for step in range(steps):
        batch, owners = rows(step)
        mine = [i for i, owner in enumerate(owners) if owner in names]
        if not mine:
            continue
        batch = {name: value[mine] for name, value in batch.items()}
        labels, owners = batch.pop("labels"), [owners[i] for i in mine]
        optimizer.zero_grad()
        losses = lorasb.adapter_losses(model(**batch, adapter_names=owners).logits, labels, owners)
        torch.stack(list(losses.values())).sum().backward()
        lorasb.clip_by_adapter(optimizer.param_groups, NORM)
        optimizer.step()


def test_together_is_as_alone() -> None:
    together = with_users(*NAMES).double()
    train(together, NAMES)
    for name in NAMES:
        alone = with_users(*NAMES).double()
        before = cores(alone, name)[0].clone()
        train(alone, (name,))
        assert not torch.equal(cores(alone, name)[0], before)
        for one, other in zip(cores(together, name), cores(alone, name), strict=True):
            check(one, other, FP64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_have_their_rows_adapters(reentrant: bool) -> None:
    kept, recomputed = with_users(*NAMES), with_users(*NAMES)
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        recomputed.enable_input_require_grads()
    calls = []
    a_layer(recomputed).register_forward_hook(lambda *_: calls.append(1))
    for model in (kept, recomputed):
        train(model, NAMES)
    assert len(calls) == 12  # twice a step
    for name in NAMES:
        assert all(map(torch.equal, cores(kept, name), cores(recomputed, name)))
    left = [[len(module._forward_pre_hooks) for module in model.modules()] for model in (kept, recomputed)]
    assert left[0] == left[1]


def test_a_loss_is_the_models_own_over_the_rows_of_an_adapter() -> None:
    model = with_users(*NAMES)
    batch, owners = rows(0)
    labels = batch.pop("labels")
    with torch.no_grad():
        losses = lorasb.adapter_losses(model(**batch, adapter_names=owners).logits, labels, owners)
        for name, loss in losses.items():
            mine = [i for i, owner in enumerate(owners) if owner == name]
            model.set_adapter(name)
            alone = model(**{k: v[mine] for k, v in batch.items()}, labels=labels[mine]).loss
            torch.testing.assert_close(loss, alone)


def test_those_without_rows_make_no_step_and_others_stay_frozen() -> None:
    model = with_users(*NAMES)
    before = cores(model, "grace")[0].clone()
    train(model, ("ada", "emmy"))
    assert torch.equal(cores(model, "grace")[0], before)
    assert not a_layer(model, "grace").lorasb_R["grace"].requires_grad


def test_norms_are_those_of_each_and_are_clipped_apart() -> None:
    model = with_users(*NAMES).train()
    groups = lorasb.adapter_parameter_groups(model, NAMES, 1e-3)
    for scale, group in zip((1.0, 1e-6), groups, strict=False):
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, scale)
    norms = lorasb.clip_by_adapter(groups, 0.5)
    assert set(norms) == {"ada", "emmy"}
    after = [torch.cat([p.grad.flatten() for p in group["params"]]).norm() for group in groups[:2]]
    torch.testing.assert_close(after[0], torch.tensor(0.5))
    assert abs(float(after[1]) - norms["emmy"]) < 1e-9


def test_what_cannot_be_is_refused() -> None:
    model = with_users(*NAMES)
    with pytest.raises(ValueError, match="adapter 'nobody' is no adapter of this model"):
        lorasb.adapter_parameter_groups(model, ["nobody"], 1e-3)
    with pytest.raises(ValueError, match="adapter 'grace' has no learning rate in lr"):
        lorasb.adapter_parameter_groups(model, NAMES, {"ada": 1e-3, "emmy": 1e-3})
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"n names, got \[2, 3, 5\], \[2, 3\] and 1"):
        lorasb.adapter_losses(logits, labels, ["ada"])
    with pytest.raises(ValueError, match="adapter 'emmy' has no labeled token in this batch"):
        lorasb.adapter_losses(logits, torch.stack((labels[0], labels[1] - 100)), ["ada", "emmy"])
