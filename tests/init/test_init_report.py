"""The report of an initialization: what its energies are, and it is printed, saved, loaded and drawn."""

from __future__ import annotations

import json

import pytest
from models import batches_for, make, patched

import lorasb
from lorasb.init import InitReport


def test_full_rank_keeps_all_energy_and_a_small_rank_less() -> None:
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


def test_a_report_is_printed_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
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


def test_a_plot_is_a_png(tmp_path) -> None:  # type: ignore[no-untyped-def]
    report = lorasb.initialize(patched(), batches_for("llama"), lr=1e-3, progress=False)
    report.plot(tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")
    data_free = lorasb.initialize(lorasb.patch(make("llama"), r=4, init="kaiming"), progress=False)
    with pytest.raises(ValueError, match="takes no gradient: there is no energy to draw"):
        data_free.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_provenance_goes_into_the_config() -> None:
    facts = patched().peft_config["default"].init_provenance
    assert facts["lr"] == 2e-2
    assert facts["longest_start"] == 4.0
    assert facts["num_samples"] == 6
    assert facts["seed"] == 0
    assert len(facts["data_sha256"]) == 64
    assert set(facts["versions"]) == {"lorasb", "torch", "python", "transformers", "peft"}
