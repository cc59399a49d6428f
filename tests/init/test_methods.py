"""Inits that need no data: their factors are what they say, and they train."""

from __future__ import annotations

import pytest
import tolerances
import torch
from gradients import factors
from models import batches_for, make

import lorasb
from lorasb.layers.linear import LoRASBLinear


@pytest.mark.parametrize("init", ["lora-xs", "lora-xs-output"])
def test_lora_xs_starts_from_the_weights_singular_vectors_and_a_small_r(init: str) -> None:
    """Σ stands with A, as in the authors' code, or with B; the other side is orthonormal."""
    model = lorasb.patch(make("llama"), r=4, init=init)
    report = lorasb.initialize(model, seed=1, progress=False)
    assert report.energy_sign is None
    for _, module in model.named_modules():
        if isinstance(module, LoRASBLinear):
            u, s, vt = torch.linalg.svd(module.base.parameter().double())
            a, b, core = (getattr(module, f"lorasb_{p}")["default"] for p in "ABR")
            scale = s[0]
            tolerances.check(b @ a / scale, u[:, :4] @ torch.diag(s[:4]) @ vt[:4] / scale, tolerances.FACTORS)
            flat, steep = (b.t(), a) if init == "lora-xs" else (a, b.t())
            tolerances.check(flat @ flat.t(), torch.eye(4), tolerances.ORTHONORMAL)
            tolerances.check(steep.norm(dim=1) / scale, s[:4] / scale, tolerances.FACTORS)
            assert 2e-6 < float(core.detach().std()) < 3e-5
            assert module.scaling["default"] == 1.0  # alpha = r for language models


def test_lora_xs_on_classification_has_alpha_16() -> None:
    model = lorasb.patch(make("roberta"), r=4, init="lora-xs")
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {16 / 4}
    model = lorasb.patch(make("roberta"), r=4, init="lora-xs", lora_alpha=8)
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {2.0}


def test_kaiming_is_orthonormal_diagonal_and_repeatable() -> None:
    models = [lorasb.patch(make("llama"), r=4, init="kaiming") for _ in range(2)]
    for model in models:
        lorasb.initialize(model, seed=7, progress=False)
    first, second = (factors(model) for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name, value in first.items():
        if "lorasb_A" in name:
            tolerances.check(value @ value.t(), torch.eye(4), tolerances.ORTHONORMAL)
        if "lorasb_R" in name:
            assert torch.equal(value, torch.diag(torch.diagonal(value)))


def test_random_is_orthonormal_and_zero_and_repeatable() -> None:
    """It depends on the seed and the layer's name alone: two bases have the same subspace."""
    models = [lorasb.patch(make("llama"), r=4, init="random", init_seed=3) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(2.0)
    lorasb.initialize(models[1], seed=3, progress=False)
    first, second = (factors(model) for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name, value in first.items():
        if "lorasb_R" in name:
            assert not value.any()
        else:
            side = value if "lorasb_A" in name else value.t()
            tolerances.check(side @ side.t(), torch.eye(4), tolerances.ORTHONORMAL)
    a = [value for name, value in first.items() if "lorasb_A" in name and "q_proj" in name]
    assert not torch.equal(a[0], a[1])


def test_random_trains_to_a_lower_loss() -> None:
    model, batch = lorasb.patch(make("llama"), r=4, init="random").train(), batches_for("llama")[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_lora_xs_trains_with_the_equivalent_gradient() -> None:
    model = lorasb.patch(make("llama"), r=4, init="lora-xs", equivalent_gradient=True).train()
    lorasb.initialize(model, progress=False)
    model(**batches_for("llama")[0]).loss.backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "lorasb_R" in n)
