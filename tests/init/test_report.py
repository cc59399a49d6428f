"""The report of an initialization, the data-free inits, the first learning rate."""

from __future__ import annotations

import json

import pytest
import tolerances
import torch
from gradients import autograd_sums, factors
from models import batches_for, make, patched, text

import lorasb
from lorasb.init import InitReport, first_step_lr
from lorasb.layers.linear import LoRASBLinear


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
        assert "update initialization: 14 layers, 6 samples" in shown
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
        assert facts["longest_start"] == 4.0
        assert facts["num_samples"] == 6
        assert facts["seed"] == 0
        assert len(facts["data_sha256"]) == 64
        assert set(facts["versions"]) == {"lorasb", "torch", "python", "transformers", "peft"}


class TestRanks:
    """What `suggest_ranks` promises, against the curves that it reads."""

    @pytest.fixture(scope="class")
    def report(self) -> InitReport:
        return lorasb.initialize(lorasb.patch(make("llama"), r=16), batches_for("llama"), lr=1e-3, progress=False)

    def test_curves_are_the_energies_of_leading_subspaces(self, report: InitReport) -> None:
        singles = [{k: v[i : i + 1] for k, v in b.items()} for b in batches_for("llama") for i in range(2)]
        want = autograd_sums("llama", singles)
        for layer in report.layers:
            gradient = want[layer.name].double()
            signs = torch.sign(gradient)
            u, s, vt = torch.linalg.svd(signs, full_matrices=False)
            inside = u.t() @ gradient @ vt.t()
            for k in (1, 2, 16):
                best = float(s[:k].square().sum() / signs.square().sum())
                assert tolerances.ENERGY * best <= layer.curve_sign[k - 1] <= best * (1 + 1e-4)
            assert layer.curve_grad[-1] <= 1 + 1e-5
            assert layer.curve_grad[0] == pytest.approx(float(inside[0, 0] ** 2 / gradient.square().sum()), abs=1e-3)
            assert (layer.energy_sign, layer.energy_grad) == (layer.curve_sign[15], layer.curve_grad[15])
            assert len(layer.singular_values) + len(layer.beyond) == len(layer.curve_sign) == min(48, *layer.shape)

    @pytest.mark.parametrize("of", ["sign", "grad"])
    def test_the_least_ranks_that_keep_a_share(self, report: InitReport, of: str) -> None:
        found = report.suggest_ranks(energy=0.5, of=of)
        for layer in report.layers:
            curve, r = getattr(layer, f"curve_{of}"), found.rank_pattern[layer.name]
            assert curve[r - 1] >= 0.5 or layer.name in found.short
            assert r == 1 or curve[r - 2] < 0.5
        assert found.trained_parameters == sum(r * r for r in found.rank_pattern.values())

    def test_layers_that_need_more_than_was_measured_are_named(self, report: InitReport) -> None:
        found = report.suggest_ranks(energy=1.0)
        assert any("gate" in name for name in found.short)
        assert all(found.rank_pattern[name] == 48 for name in found.short if "gate" in name)

    @pytest.mark.parametrize("parameters", [14, 500, 3000])
    def test_a_budget_is_kept_and_used(self, report: InitReport, parameters: int) -> None:
        found = report.suggest_ranks(parameters=parameters)
        assert found.trained_parameters <= parameters
        equal = max(1, int((parameters / len(report.layers)) ** 0.5))
        even = sum(layer.curve_sign[equal - 1] for layer in report.layers) / len(report.layers)
        assert found.energy >= even - 1e-9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "expected an energy target or a number of parameters"),
            ({"energy": 0.5, "parameters": 5}, "expected an energy target or a number of parameters"),
            ({"energy": 1.5}, r"an energy target in \(0, 1\], got 1\.5"),
            ({"parameters": 5}, "at least one parameter for each of 14 layers, got 5"),
            ({"energy": 0.5, "of": "weight"}, "of must be 'sign' or 'grad', got 'weight'"),
        ],
    )
    def test_bad_targets(self, report: InitReport, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            report.suggest_ranks(**options)

    def test_stability_of_equal_halves_is_one(self) -> None:
        batch = text(1, 12, 0)
        model = lorasb.patch(make("llama"), r=4)
        twice = lorasb.initialize(model, [batch, batch], lr=1e-3, stability=True, progress=False)
        assert twice.stability == pytest.approx(1.0, abs=1e-3)
        other = lorasb.initialize(model, [batch, text(1, 12, 1)], lr=1e-3, stability=True, progress=False)
        assert 0 < other.stability < 0.9
        plain = lorasb.initialize(model, [batch, text(1, 12, 1)], lr=1e-3, progress=False)
        assert plain.stability is None
        assert [layer.energy_sign for layer in plain.layers] == [layer.energy_sign for layer in other.layers]

    @pytest.mark.parametrize("kind", ["layers", "ranks", "spectrum"])
    def test_pictures(self, report: InitReport, kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
        report.plot(tmp_path / "a.png", kind)
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="kind must be one of layers, ranks, spectrum, got 'pie'"):
            report.plot(tmp_path / "b.png", "pie")


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
