"""`lorasb.initialize`: factors that are the best of their rank, of a length that is bounded, and a model as it was found."""

from __future__ import annotations

import pytest
import tolerances
import torch
from gradients import autograd_sums, factors
from models import Batch, batches_for, make, patched
from torch import Tensor, nn

import lorasb
from lorasb.init import InitReport
from lorasb.layers.linear import LoRASBLinear


def test_no_base_weight_requires_a_gradient_meanwhile() -> None:
    model = lorasb.patch(make("roberta"), r=4)

    def loss_fn(inner: nn.Module, batch: Batch) -> Tensor:
        assert not any(p.requires_grad for p in inner.parameters())
        assert not any(m.training for m in inner.modules())
        return inner(**batch).loss

    lorasb.initialize(model, batches_for("roberta"), lr=1e-3, loss_fn=loss_fn, progress=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "roberta"])
@pytest.mark.parametrize("update", ["adamw", "sgd"])
def test_factors_are_the_best_rank_r_part_of_the_first_step(family: str, update: str) -> None:
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in batches_for(family) for i in range(2)]
    want = autograd_sums(family, singles)
    model = lorasb.patch(make(family), r=5, scaling=2.0)
    lorasb.initialize(model, singles, lr=1e-2, update=update, longest_start=None, progress=False)
    for name, module in model.named_modules():
        if isinstance(module, LoRASBLinear):
            g = want[name.removeprefix("base_model.model.")].double()
            step = -1e-2 * (torch.sign(g) if update == "adamw" else g / len(singles))
            a, core, b = (getattr(module, f"lorasb_{part}")["default"].double() for part in "ARB")
            sigma = torch.linalg.svdvals(step)
            tolerances.check(a @ a.t(), torch.eye(5), tolerances.ORTHONORMAL)
            tolerances.check(b.t() @ b, torch.eye(5), tolerances.ORTHONORMAL)
            tolerances.check(2.0 * core / sigma[0], b.t() @ step @ a.t() / sigma[0], tolerances.FACTORS)
            assert (2.0 * core).square().sum() >= tolerances.ENERGY * sigma[:5].square().sum()  # near ties: by energy
            assert (torch.diagonal(core) > 0).all()


def cores(
    longest_start: float | None, update: str = "adamw", scaling: float = 1.0
) -> tuple[dict[str, Tensor], InitReport]:
    """s·R of all layers, and the report."""
    model = lorasb.patch(make("llama"), r=4, scaling=scaling)
    options = {"lr": 1e-3, "update": update, "longest_start": longest_start, "progress": False}
    report = lorasb.initialize(model, batches_for("llama"), **options)
    return {name: scaling * p.detach() for name, p in model.named_parameters() if "lorasb_R" in name}, report


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_a_long_start_is_as_long_as_so_many_steps_of_adamw(scaling: float) -> None:
    whole, _ = cores(None, scaling=scaling)
    step = torch.nn.Parameter(torch.zeros(4, 4))
    step.grad = torch.randn(4, 4)
    torch.optim.AdamW([step], lr=1e-3).step()
    for steps in (1.0, 1.5):
        found, report = cores(steps, scaling=scaling)
        shares = {layer.name: layer.start for layer in report.layers}
        for name, core in found.items():
            share = next(value for layer, value in shares.items() if layer in name)
            tolerances.check(core, share * whole[name], tolerances.FACTORS)
            assert float(core.norm()) <= steps * float(step.norm().detach()) * (1 + 1e-4)
            assert share == 1.0 or float(core.norm()) == pytest.approx(steps * float(step.norm().detach()), rel=1e-4)
        assert min(shares.values()) < 1.0
        assert f"R starts {steps:g} of its steps away" in str(report)


def test_starts_without_a_limit_and_without_a_start() -> None:
    whole, report = cores(None)
    assert all(layer.start == 1.0 for layer in report.layers)
    assert "steps away" not in str(report)
    assert all(torch.equal(core, whole[name]) for name, core in cores(1e6)[0].items())
    assert not any(core.any() for core in cores(0.0)[0].values())
    assert all(torch.equal(core, cores(0.0, "sgd")[0][name]) for name, core in cores(None, "sgd")[0].items())


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_start_that_is_no_length_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="longest_start"):
        cores(bad)


def test_the_first_step_lowers_the_loss() -> None:
    model = lorasb.patch(make("llama"), r=16)
    batches = batches_for("llama")
    before = sum(float(model(**b).loss.detach()) for b in batches)
    lorasb.initialize(model, batches, lr=1e-3, progress=False)
    assert sum(float(model(**b).loss.detach()) for b in batches) < before


def test_a_bf16_layer_has_orthonormal_factors_up_to_its_rounding() -> None:
    for name, p in patched(dtype=torch.bfloat16).named_parameters():
        if "lorasb_A" in name:
            assert p.dtype == torch.bfloat16
            tolerances.check(p.double() @ p.double().t(), torch.eye(4), tolerances.ROUNDED_FACTORS)


def test_repeatable_and_the_global_rng_stays_where_it_was() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = lorasb.patch(make("llama"), r=4)
    torch.set_rng_state(state)
    lorasb.initialize(first, batches_for("llama"), lr=1e-3, num_samples=4, seed=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    second, third = (lorasb.patch(make("llama"), r=4) for _ in range(2))
    lorasb.initialize(second, batches_for("llama"), lr=1e-3, num_samples=4, seed=5, progress=False)
    lorasb.initialize(third, batches_for("llama"), lr=1e-3, num_samples=4, seed=6, progress=False)
    assert all(torch.equal(value, factors(second)[name]) for name, value in factors(first).items())
    assert not all(torch.equal(value, factors(third)[name]) for name, value in factors(first).items())


def test_the_model_is_left_as_it_was_found() -> None:
    model = lorasb.patch(make("roberta"), r=4).train()
    model.base_model.model.roberta.embeddings.eval()
    model.config.use_cache = True
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lorasb" not in n}
    lorasb.initialize(model, batches_for("roberta"), lr=1e-3, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert model.config.use_cache is True
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, LoRASBLinear))


@pytest.mark.parametrize("update", ["adamw", "per-sample"])
def test_under_the_callers_autocast_factors_are_orthonormal(update: str) -> None:
    model = lorasb.patch(make("llama"), r=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3, update=update, progress=False)
    for name, p in model.named_parameters():
        if "lorasb_A" in name:
            tolerances.check(p @ p.t(), torch.eye(4), tolerances.ORTHONORMAL)


@pytest.mark.parametrize("update", ["adamw", "sgd", "per-sample"])
def test_the_energy_of_the_sign_is_of_the_sign_whatever_was_factored(update: str) -> None:
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in batches_for("llama") for i in range(2)]
    want = autograd_sums("llama", singles)
    model = lorasb.patch(make("llama"), r=4)
    report = lorasb.initialize(model, singles, lr=1e-3, update=update, progress=False)
    for layer in report.layers:
        signs = want[layer.name].double().sign()
        module = model.get_submodule(f"base_model.model.{layer.name}")
        b, a = (getattr(module, f"lorasb_{part}")["default"].double() for part in "BA")
        share = (b.t() @ signs @ a.t()).square().sum() / signs.square().sum()
        assert layer.energy_sign == pytest.approx(float(share), abs=1e-3)
