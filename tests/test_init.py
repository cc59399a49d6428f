"""Initialisation: the gradients are plain autograd's, the sum is over samples, the factors are the best of their rank."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator

import pytest
import tolerances
import torch
from conftest import Batch, batches_for, logits, make, patched, text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler

import lorasb
from lorasb.init import InitReport, first_step_lr
from lorasb.init.accumulator import GradientSums
from lorasb.init.factors import energy, from_gradient
from lorasb.init.loss import backward_over_samples
from lorasb.init.samples import select
from lorasb.init.svd import truncated_svd
from lorasb.linear import LoRASBLinear


def autograd_sums(family: str, batches: list[Batch]) -> dict[str, Tensor]:
    """Σ_i ∇W L(x_i) by plain autograd: one sample at a time, every weight requiring a gradient."""
    model = make(family)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters() if p.grad is not None}


def hooked_sums(family: str, batches: list[Batch]) -> dict[str, Tensor]:
    """The same by the library's hooks, all weights frozen."""
    model = make(family).requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n}
    with GradientSums(layers) as sums:
        for batch in batches:
            backward_over_samples(model, batch, None)
    return sums.sums


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lorasb_" in name}


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


def padded(samples: list[Batch], width: int) -> Batch:
    """One batch of samples of unequal length, padded on the right."""
    rows = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat([nn.functional.pad(s[key], (0, width - s[key].shape[1]), value=fill) for s in samples])
        for key, fill in rows.items()
    }


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
        sums.append(found.sums["head"])
    scale = sums[0].abs().max()
    tolerances.check(sums[1] / scale, sums[0] / scale, tolerances.BATCHING)


def test_a_loss_that_is_not_recognised_is_taken_sample_by_sample() -> None:
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
        sums.append(found.sums["q"])
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
        sums.append(found.sums["q"])
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
    lorasb.initialize(model, singles, lr=1e-2, update=update, progress=False)
    for name, module in model.named_modules():
        if isinstance(module, LoRASBLinear):
            g = want[name.removeprefix("base_model.model.")].double()
            step = -1e-2 * (torch.sign(g) if update == "adamw" else g)
            a, core, b = (getattr(module, f"lorasb_{part}")["default"].double() for part in "ARB")
            sigma = torch.linalg.svdvals(step)
            tolerances.check(a @ a.t(), torch.eye(5), tolerances.ORTHONORMAL)
            tolerances.check(b.t() @ b, torch.eye(5), tolerances.ORTHONORMAL)
            tolerances.check(2.0 * core / sigma[0], b.t() @ step @ a.t() / sigma[0], tolerances.FACTORS)
            assert (2.0 * core).square().sum() >= tolerances.ENERGY * sigma[:5].square().sum()  # near ties: by energy
            assert (torch.diagonal(core) > 0).all()


def test_the_first_step_lowers_the_loss() -> None:
    model = lorasb.patch(make("llama"), r=16)
    batches = batches_for("llama")
    before = sum(float(model(**b).loss.detach()) for b in batches)
    lorasb.initialize(model, batches, lr=1e-3, progress=False)
    assert sum(float(model(**b).loss.detach()) for b in batches) < before


def test_bf16_gradients_are_summed_in_fp32() -> None:
    layer = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    want = torch.zeros(6, 8)
    with GradientSums({"layer": layer}) as found:
        for _ in range(20):
            x, dy = (torch.randn(5, size, generator=g).bfloat16() for size in (8, 6))
            layer(x).backward(dy)
            want += dy.float().t() @ x.float()
    assert found.sums["layer"].dtype == torch.float32
    assert torch.equal(found.sums["layer"], want)


def test_a_bf16_layer_has_orthonormal_factors_up_to_its_rounding() -> None:
    for name, p in patched(dtype=torch.bfloat16).named_parameters():
        if "lorasb_A" in name:
            assert p.dtype == torch.bfloat16
            tolerances.check(p.double() @ p.double().t(), torch.eye(4), tolerances.ROUNDED_FACTORS)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 64), (40, 300)])
@pytest.mark.parametrize("kind", ["signs", "decaying", "noise"])
def test_svd_captures_the_optimal_energy(shape: tuple[int, int], kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape[0], 8, generator=g) @ torch.randn(8, shape[1], generator=g)
    matrix = matrix + 2.0 * torch.randn(shape, generator=g)
    if kind == "signs":
        matrix = torch.sign(matrix)
    elif kind == "decaying":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.diag(s * 0.8 ** torch.arange(len(s))) @ vt
    for r in (1, 16, min(32, *shape), min(shape)):
        u, s, vt = truncated_svd(matrix, r, seed=0)
        optimum = torch.linalg.svdvals(matrix.double())[:r].square().sum()
        inside = (u.double().t() @ matrix.double() @ vt.double().t()).square().sum()
        assert inside / optimum >= tolerances.ENERGY
        tolerances.check(u.t() @ u, torch.eye(r), tolerances.ORTHONORMAL)
        tolerances.check(vt @ vt.t(), torch.eye(r), tolerances.ORTHONORMAL)
        assert (s[:-1] >= s[1:] - 1e-4 * s[0]).all()
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_svd_of_real_gradients_captures_the_optimal_energy() -> None:
    for name, gradient in autograd_sums("llama", batches_for("llama")).items():
        if gradient.dim() == 2 and min(gradient.shape) > 40 and "embed" not in name:
            found = from_gradient(gradient, 8, 1.0, 1.0, "adamw", seed=0)
            optimum = torch.linalg.svdvals(torch.sign(gradient).double())[:8].square().sum() / gradient.numel()
            assert energy(torch.sign(gradient), found) >= tolerances.ENERGY * optimum


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


class TestSamples:
    def test_default_count(self) -> None:
        for available, wanted in ((5, 5), (40, 32), (32_001, 33)):
            loader = DataLoader([{"x": torch.zeros(1)}] * available, batch_size=16)
            samples = select(loader, None, seed=0)
            assert sum(1 for _ in samples) == -(-wanted // 16)
            assert samples.seen == wanted

    def test_an_iterable_without_a_size_is_taken_whole_or_in_order(self) -> None:
        def stream() -> Iterator[Batch]:
            yield from ({"x": torch.full((3,), float(i))} for i in range(4))

        whole = select(stream(), None, seed=0)
        assert [float(batch["x"][0]) for batch in whole] == [0, 1, 2, 3]
        assert whole.seen == 12
        first = [batch["x"].tolist() for batch in select(stream(), 7, seed=0)]
        assert first == [[0.0] * 3, [1.0] * 3, [2.0]]

    def test_empty_batches_are_passed_over(self) -> None:
        samples = select(iter([{"x": torch.zeros(n)} for n in (2, 0, 3)]), None, seed=0)
        assert [len(batch["x"]) for batch in samples] == [2, 3]
        assert samples.seen == 5

    def test_a_loader_with_a_sampler_of_its_own_keeps_its_choice(self) -> None:
        data = [{"x": torch.tensor([i])} for i in range(100)]
        for sampler in (SubsetRandomSampler(range(20)), DistributedSampler(data, num_replicas=5, rank=1)):
            chosen = set(sampler)
            samples = select(DataLoader(data, batch_size=4, sampler=sampler), 16, seed=0)
            drawn = [int(value) for batch in samples for value in batch["x"]]
            assert len(drawn) == samples.seen == 16
            assert set(drawn) <= chosen

    def test_a_loader_of_ready_batches(self) -> None:
        samples = select(DataLoader([{"x": torch.zeros(3, 2)}] * 4, batch_size=None), 7, seed=0)
        assert sum(len(batch["x"]) for batch in samples) == 7

    @given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=5), share=st.floats(0.01, 1), seed=st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_a_list_is_drawn_by_rows_without_repetition(self, rows: list[int], share: float, seed: int) -> None:
        total, start, batches = sum(rows), 0, []
        for count in rows:
            batches.append({"x": torch.arange(start, start + count)})
            start += count
        wanted = max(1, int(total * share))
        drawn = [value for batch in select(batches, wanted, seed) for value in batch["x"].tolist()]
        again = [value for batch in select(batches, wanted, seed) for value in batch["x"].tolist()]
        assert drawn == again
        assert len(drawn) == len(set(drawn)) == wanted

    @pytest.mark.parametrize("kind", ["loader", "list", "stream"])
    def test_too_few_samples_names_both_numbers(self, kind: str) -> None:
        data: dict[str, Callable[[], object]] = {
            "loader": lambda: DataLoader([{"x": torch.zeros(1)}] * 5, batch_size=2),
            "list": lambda: [{"x": torch.zeros(2)}, {"x": torch.zeros(3)}],
            "stream": lambda: iter([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}]),
        }
        with pytest.raises(ValueError, match="num_samples=9, but the batches hold 5 samples"):
            list(select(data[kind](), 9, seed=0))

    @pytest.mark.parametrize("empty", [[], iter([])], ids=["list", "stream"])
    def test_no_samples(self, empty: object) -> None:
        with pytest.raises(ValueError, match="expected at least one sample to initialise from, got none"):
            list(select(empty, None, seed=0))

    @pytest.mark.parametrize("bad", [{"x": 1}, "text", 3])
    def test_not_batches(self, bad: object) -> None:
        with pytest.raises(TypeError, match=r"expected batches \(a DataLoader|expected an iterable of batches"):
            select(bad, None, seed=0)

    def test_batches_that_are_no_dicts(self) -> None:
        with pytest.raises(TypeError, match=r"expected batches as dicts of tensors, got Tensor: give a collate_fn"):
            select([torch.zeros(3)], None, seed=0)

    def test_ragged_batches(self) -> None:
        with pytest.raises(ValueError, match=r"share their first dimension, got \[2, 3\]"):
            select([{"x": torch.zeros(2), "y": torch.zeros(3)}], None, seed=0)


def unlabelled() -> list[Batch]:
    return [{k: v for k, v in b.items() if k != "labels"} for b in batches_for("llama")]


def ignored() -> list[Batch]:
    return [b | {"labels": torch.full_like(b["labels"], -100)} for b in batches_for("llama")]


BAD_CALLS = {
    "no labels": (lambda: {"batches": unlabelled()}, "the model returned no loss .*: add labels to the batches, or pass loss_fn"),
    "only ignored labels": (lambda: {"batches": ignored()}, "no sample has a labelled token: every label of these batches is -100"),
    "lr infinite": (lambda: {"lr": float("inf")}, "init='update' takes batches and lr > 0"),
    "no batches": (lambda: {"batches": None}, "init='update' takes batches and lr > 0"),
    "empty batches": (lambda: {"batches": []}, "expected at least one sample"),
    "no lr": (lambda: {"lr": None}, "init='update' takes batches and lr > 0"),
    "lr zero": (lambda: {"lr": 0.0}, "init='update' takes batches and lr > 0"),
    "update": (lambda: {"update": "lion"}, "update must be one of adamw, sgd, got 'lion'"),
    "strategy": (lambda: {"strategy": "fast"}, "strategy must be one of .*, got 'fast'"),
    "too many samples": (lambda: {"num_samples": 99}, "num_samples=99, but the batches hold 6 samples"),
    "no samples": (lambda: {"num_samples": 0}, "expected num_samples >= 1, got 0"),
    "adapter": (lambda: {"adapter_name": "other"}, "no layer has an adapter 'other': the model has default"),
    "loss without a graph": (lambda: {"loss_fn": lambda m, b: torch.ones(())}, "does not depend on any adapted layer"),
    "loss per sample": (lambda: {"loss_fn": lambda m, b: m(**b).logits[:, 0, 0]}, r"expected one loss, got a tensor \[2\]"),
    "layers not reached": (
        lambda: {"loss_fn": lambda m, b: m.get_base_model().model.layers[0](
            m.get_base_model().model.embed_tokens(b["input_ids"]),
            position_embeddings=m.get_base_model().model.rotary_emb(torch.zeros(1, 1, 64), torch.arange(12)[None]),
        ).mean()},
        "layer 'model.layers.1.self_attn.q_proj' was never reached",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_change_nothing(name: str) -> None:
    change, message = BAD_CALLS[name]
    model = patched()
    before, answer, modes = factors(model), logits(model), [m.training for m in model.modules()]
    provenance = copy.deepcopy(model.peft_config["default"].init_provenance)
    with pytest.raises(ValueError, match=message):
        lorasb.initialize(model, **{"batches": batches_for("llama"), "lr": 1e-3, "progress": False} | change())
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    assert torch.equal(logits(model), answer)
    assert [m.training for m in model.modules()] == modes
    assert model.peft_config["default"].init_provenance == provenance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    model = patched()
    before = factors(model)

    def loss_fn(inner: nn.Module, batch: Batch) -> Tensor:
        values = inner(**batch).logits
        values.register_hook(lambda g: g * value)
        return values.square().mean()

    with pytest.raises(ValueError, match=r"the gradient of layer 'model\.layers\..*' has NaN or Inf entries"):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3, loss_fn=loss_fn, progress=False)
    assert all(torch.equal(value_, before[key]) for key, value_ in factors(model).items())


def test_a_gradient_that_is_zero() -> None:
    with pytest.raises(ValueError, match="is zero: the loss does not depend on it"):
        lorasb.initialize(
            patched(), batches_for("llama"), lr=1e-3, loss_fn=lambda m, b: 0.0 * m(**b).logits.sum(), progress=False
        )


def test_interrupted() -> None:
    model = patched()
    before, flags = factors(model), [p.requires_grad for p in model.parameters()]

    def stream() -> Iterator[Batch]:
        yield batches_for("llama")[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorasb.initialize(model, stream(), lr=1e-3, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in factors(model).items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules() if isinstance(m, LoRASBLinear))


def test_merged_or_unpatched_models() -> None:
    model = patched()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected unmerged weights.*model\.unmerge_adapter\(\)"):
        lorasb.initialize(model, batches_for("llama"), lr=1e-3)
    with pytest.raises(ValueError, match=r"call model = lorasb\.patch\(model\) first"):
        lorasb.initialize(make("llama"), batches_for("llama"), lr=1e-3)


class TestBaselines:
    def test_lora_xs(self) -> None:
        model = lorasb.patch(make("llama"), r=4, init="lora-xs")
        report = lorasb.initialize(model, seed=1, progress=False)
        assert report.energy_sign is None
        for _, module in model.named_modules():
            if isinstance(module, LoRASBLinear):
                u, s, vt = torch.linalg.svd(module.base_weight().double())
                a, b, core = (getattr(module, f"lorasb_{p}")["default"] for p in "ABR")
                scale = s[0]
                tolerances.check(b @ a / scale, u[:, :4] @ torch.diag(s[:4]) @ vt[:4] / scale, tolerances.FACTORS)
                tolerances.check(a @ a.t(), torch.eye(4), tolerances.ORTHONORMAL)
                assert 2e-6 < float(core.detach().std()) < 3e-5
                assert module.scaling["default"] == 1.0  # alpha = r for language models

    def test_lora_xs_on_classification_has_alpha_16(self) -> None:
        model = lorasb.patch(make("roberta"), r=4, init="lora-xs")
        assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {16 / 4}
        model = lorasb.patch(make("roberta"), r=4, init="lora-xs", lora_alpha=8)
        assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoRASBLinear)} == {2.0}

    def test_kaiming(self) -> None:
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

    def test_they_train_with_the_equivalent_gradient(self) -> None:
        model = lorasb.patch(make("llama"), r=4, init="lora-xs", equivalent_gradient=True).train()
        lorasb.initialize(model, progress=False)
        model(**batches_for("llama")[0]).loss.backward()
        assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "lorasb_R" in n)


class TestReport:
    def test_energies_and_values(self) -> None:
        model = lorasb.patch(make("llama"), r=64, target_modules=["q_proj", "gate_proj"])
        report = lorasb.initialize(model, batches_for("llama"), lr=1e-3, progress=False)
        for layer in report.layers:
            assert layer.rank == 64 == len(layer.singular_values)
            if layer.shape == (64, 64):
                assert layer.energy_sign == pytest.approx(1.0, abs=1e-4)
                assert layer.energy_grad == pytest.approx(1.0, abs=1e-4)
                assert sum(s * s for s in layer.singular_values) == pytest.approx(64 * 64 - layer.zeros, rel=1e-4)
        small = lorasb.initialize(lorasb.patch(make("llama"), r=2), batches_for("llama"), lr=1e-3, progress=False)
        assert 0 < small.energy_sign < report.energy_sign

    def test_prints_saves_and_loads(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        report = lorasb.initialize(patched(), batches_for("llama"), lr=1e-3, progress=False)
        shown = str(report)
        assert "update initialisation: 14 layers, 6 samples" in shown
        assert "model.layers.1.mlp.down_proj" in shown
        report.save(tmp_path / "report.json")
        assert InitReport.load(tmp_path / "report.json") == report
        values = json.loads((tmp_path / "report.json").read_text())
        assert set(values["layers"][0]) >= {
            "shape",
            "rank",
            "energy_sign",
            "energy_grad",
            "singular_values",
            "zeros",
            "seconds",
        }

    def test_plots(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        report = lorasb.initialize(patched(), batches_for("llama"), lr=1e-3, progress=False)
        report.plot(tmp_path / "energy.png")
        assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")
        data_free = lorasb.initialize(lorasb.patch(make("llama"), r=4, init="kaiming"), progress=False)
        with pytest.raises(ValueError, match="takes no gradient: there is no energy to draw"):
            data_free.plot(tmp_path / "none.png")
        assert not (tmp_path / "none.png").exists()

    def test_provenance_goes_into_the_config(self) -> None:
        facts = patched().peft_config["default"].init_provenance
        assert facts["lr"] == 2e-2
        assert facts["num_samples"] == 6
        assert facts["seed"] == 0
        assert len(facts["data_sha256"]) == 64
        assert set(facts["versions"]) == {"lorasb", "torch", "python", "transformers", "peft"}


def test_first_step_lr() -> None:
    assert first_step_lr(2e-3) == 2e-3
    assert first_step_lr(2e-3, 20) == pytest.approx(1e-4)
    assert first_step_lr(2e-3, 0.1, total_steps=200) == pytest.approx(1e-4)
    for arguments, message in (
        ((0.0,), "positive learning rate"),
        ((1e-3, -1), ">= 0"),
        ((1e-3, 0.1), "give total_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            first_step_lr(*arguments)
