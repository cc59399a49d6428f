"""Initialization: the gradients are plain autograd's, the sum is over samples, the factors are the best of their rank."""

from __future__ import annotations

import pytest
import tolerances
import torch
from gradients import autograd_sums, factors, hooked_sums, padded
from models import Batch, batches_for, make, patched, text
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lorasb
from lorasb.init import InitReport
from lorasb.init.gradients.accumulator import GradientSums
from lorasb.init.gradients.loss import backward_over_samples
from lorasb.layers.linear import LoRASBLinear


@pytest.mark.parametrize("family", ["llama", "gemma2", "roberta"])
def test_sums_are_plain_autograds(family: str) -> None:
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in batches_for(family) for i in range(2)]
    want, got = autograd_sums(family, singles), hooked_sums(family, singles)
    assert len(got) >= 12
    for name, gradient in got.items():
        assert torch.equal(gradient, want[name]), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "roberta"])
def test_a_sum_over_samples_however_they_are_batched(family: str) -> None:
    batches = batches_for(family, count=2, rows=3)
    want, got = autograd_sums(family, batches), hooked_sums(family, batches)
    for name, gradient in got.items():
        scale = want[name].abs().max()
        tolerances.check(gradient / scale, want[name] / scale, tolerances.BATCHING)


def test_padding_and_unequal_lengths_do_not_matter() -> None:
    samples = [text(1, tokens, seed) for seed, tokens in enumerate((5, 12, 8, 9))]
    want = autograd_sums("llama", samples)
    for batches in ([padded(samples, 12)], [padded(samples[:3], 20), padded(samples[3:], 11)]):
        for name, gradient in hooked_sums("llama", batches).items():
            scale = want[name].abs().max()
            tolerances.check(gradient / scale, want[name] / scale, tolerances.BATCHING)


def test_the_batch_size_of_a_loader_does_not_matter() -> None:
    samples = [text(1, tokens, seed) for seed, tokens in enumerate((5, 12, 8, 9, 7, 10))]
    reports = []
    for size in (1, 2, 6):
        model = lorasb.patch(make("llama"), r=4)
        loader = DataLoader(samples, batch_size=size, collate_fn=lambda rows: padded(rows, 12))
        reports.append(lorasb.initialize(model, loader, lr=1e-3, num_samples=5, seed=3, progress=False))
        assert reports[-1].num_samples == 5
    for report in reports[1:]:
        assert report.loss == pytest.approx(reports[0].loss, rel=1e-5)
        for layer, first in zip(report.layers, reports[0].layers, strict=True):
            assert layer.energy_sign == pytest.approx(first.energy_sign, abs=2e-3)


def test_the_head_itself_may_be_a_target() -> None:
    samples = [text(1, tokens, seed) for seed, tokens in enumerate((5, 12, 8))]
    sums = []
    for batches in (samples, [padded(samples, 12)]):
        model = make("llama").requires_grad_(False)
        with GradientSums({"head": model.lm_head}) as found:
            for batch in batches:
                backward_over_samples(model, batch, None)
        sums.append(found.totals()["head"])
    scale = sums[0].abs().max()
    tolerances.check(sums[1] / scale, sums[0] / scale, tolerances.BATCHING)


def test_a_loss_that_is_not_recognized_is_taken_sample_by_sample() -> None:
    class Smoothed(nn.Module):
        """Label smoothing: no plain cross entropy of the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = make("roberta")
            self.config = self.inner.config
            self.calls = 0

        def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            values = self.inner(**batch).logits
            return {"loss": nn.functional.cross_entropy(values, labels, label_smoothing=0.3), "logits": values}

    sums = []
    for rows in (1, 3):
        model = Smoothed().eval().requires_grad_(False)
        layers = {"q": model.inner.roberta.encoder.layer[0].attention.self.query}
        with GradientSums(layers) as found:
            for i in range(0, 3, rows):
                backward_over_samples(
                    model, {k: v[i : i + rows] for k, v in batches_for("roberta", 1, 3)[0].items()}, None
                )
        sums.append(found.totals()["q"])
        assert model.calls == (3 if rows == 1 else 4)
    assert torch.equal(*sums)


def test_logits_that_are_a_copy_are_not_trusted() -> None:
    """What accelerate's mixed precision returns: an fp32 copy of the logits that the loss was computed from."""

    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("llama", dtype=torch.bfloat16)

        def forward(self, **batch: Tensor) -> dict[str, Tensor]:
            outputs = self.inner(**batch)
            return {"loss": outputs.loss, "logits": outputs.logits.float() * 1.0}

    samples, sums = [text(1, tokens, seed) for seed, tokens in enumerate((5, 12))], []
    for batches in (samples, [padded(samples, 12)]):
        model = Prepared().eval().requires_grad_(False)
        with GradientSums({"q": model.inner.model.layers[0].self_attn.q_proj}) as found:
            for batch in batches:
                backward_over_samples(model, batch, None)
        sums.append(found.totals()["q"])
    assert (sums[1] - sums[0]).norm() < 2e-2 * sums[0].norm()  # rounding in bf16; a plain mean is off by half


def test_samples_without_a_label_count_nothing() -> None:
    samples = [text(1, 12, seed) for seed in range(3)]
    silent = text(1, 12, 9) | {"labels": torch.full((1, 12), -100)}
    want = autograd_sums("llama", samples)
    for batches in ([*samples, silent], [padded([*samples, silent], 12)]):
        for name, gradient in hooked_sums("llama", batches).items():
            scale = want[name].abs().max()
            tolerances.check(gradient / scale, want[name] / scale, tolerances.BATCHING)


def test_no_base_weight_requires_a_gradient_meanwhile() -> None:
    model = lorasb.patch(make("roberta"), r=4)

    def loss_fn(inner: nn.Module, batch: Batch) -> Tensor:
        assert not any(p.requires_grad for p in inner.parameters())
        assert not any(m.training for m in inner.modules())
        return inner(**batch).loss

    lorasb.initialize(model, batches_for("roberta"), lr=1e-3, loss_fn=loss_fn, progress=False)


def test_loss_fn_counts_times_the_batchs_samples() -> None:
    batches = batches_for("llama", count=2, rows=3)
    seen = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(len(batch["input_ids"]))
        return model(**batch).loss

    model = lorasb.patch(make("llama"), r=4)
    report = lorasb.initialize(model, batches, lr=1e-3, loss_fn=loss_fn, progress=False)
    assert seen == [3, 3]
    own = sum(float(make("llama")(**batch).loss.detach()) * 3 for batch in batches) / 6
    assert report.loss == pytest.approx(own, rel=1e-5)


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
def test_a_start_that_is_no_length(bad: float) -> None:
    with pytest.raises(ValueError, match="longest_start"):
        cores(bad)


def test_the_first_step_lowers_the_loss() -> None:
    model = lorasb.patch(make("llama"), r=16)
    batches = batches_for("llama")
    before = sum(float(model(**b).loss.detach()) for b in batches)
    lorasb.initialize(model, batches, lr=1e-3, progress=False)
    assert sum(float(model(**b).loss.detach()) for b in batches) < before


def test_bf16_gradients_are_summed_in_fp32() -> None:
    layer = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    want = torch.zeros(6, 8, dtype=torch.float64)
    with GradientSums({"layer": layer}) as found:
        for _ in range(20):
            x, dy = (torch.randn(5, size, generator=g).bfloat16() for size in (8, 6))
            layer(x).backward(dy)
            want += dy.double().t() @ x.double()
    assert found.totals()["layer"].dtype == torch.float32
    tolerances.check(found.totals()["layer"], want, tolerances.fp32(100))


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


def test_samples_with_nothing_to_predict_count_nothing() -> None:
    """A causal sample whose only label is its first token, alone and in a batch; and the mean loss is over the others."""
    samples = [text(1, 12, seed) for seed in range(2)]
    labels = torch.full((1, 12), -100)
    nothing = [
        text(1, 12, 9) | {"labels": labels},
        text(1, 12, 8) | {"labels": labels.index_fill(1, torch.tensor([0]), 5)},
    ]
    want = lorasb.initialize(lorasb.patch(make("llama"), r=4), samples, lr=1e-3, progress=False)
    for batches in ([*samples, *nothing], [padded([*samples, *nothing], 12)]):
        model = lorasb.patch(make("llama"), r=4)
        found = lorasb.initialize(model, batches, lr=1e-3, progress=False)
        assert found.energy_sign == pytest.approx(want.energy_sign, abs=1e-3)
    silent = lorasb.initialize(lorasb.patch(make("llama"), r=4), [*samples, nothing[0]], lr=1e-3, progress=False)
    assert silent.loss == pytest.approx(want.loss, rel=1e-6)


def test_under_the_callers_autocast_factors_are_orthonormal() -> None:
    model = lorasb.patch(make("llama"), r=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3, progress=False)
    for name, p in model.named_parameters():
        if "lorasb_A" in name:
            tolerances.check(p @ p.t(), torch.eye(4), tolerances.ORTHONORMAL)
