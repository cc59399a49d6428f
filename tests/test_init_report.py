"""The report of an initialisation, the data-free inits, the first learning rate."""

from __future__ import annotations

import json

import pytest
import tolerances
import torch
from conftest import batches_for, make, patched
from gradients import factors

import lorasb
from lorasb.init import InitReport, first_step_lr
from lorasb.linear import LoRASBLinear


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
