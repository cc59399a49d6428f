"""The report of an initialization: energies, printed, saved, loaded and plotted; suggested ranks."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tolerances
import torch
from gradients import autograd_sums
from models import batches_for, make, patched, started, text

import lorasb
from lorasb.init import InitReport, LayerReport


@pytest.fixture(scope="module")
def report() -> InitReport:
    return started(r=16)[1]


def test_a_report_is_printed_saved_and_loaded(report: InitReport, tmp_path: Path) -> None:
    shown = str(report)
    assert "update initialization: 14 layers, 6 samples" in shown
    assert re.search(r"down_proj +│ +2 │ 16 │", shown)
    assert "from [/c].cache" in str(replace(report, why="signs from [/c].cache"))
    report.save(tmp_path / "report.json")
    assert InitReport.load(tmp_path / "report.json") == report
    kept = {"shape", "rank", "energy_sign", "energy_grad", "singular_values", "zeros", "seconds"}
    assert set(json.loads((tmp_path / "report.json").read_text())["layers"][0]) >= kept


def test_provenance_goes_into_the_config() -> None:
    facts = patched().peft_config["default"].init_provenance
    assert facts.items() >= {"lr": 2e-2, "longest_start": 4.0, "num_samples": 6, "seed": 0}.items()
    assert len(facts["data_sha256"]) == 64
    assert set(facts["versions"]) == {"lorasb", "torch", "python", "transformers", "peft"}


def test_curves_are_the_energies_of_leading_subspaces(report: InitReport) -> None:
    want = autograd_sums("llama", batches_for("llama"))
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
def test_suggested_ranks_are_the_least_that_keep_a_share(report: InitReport, of: str) -> None:
    found = report.suggest_ranks(energy=0.5, of=of)
    for layer in report.layers:
        curve, r = getattr(layer, f"curve_{of}"), found.rank_pattern[layer.name]
        assert curve[r - 1] >= 0.5 or layer.name in found.short
        assert r == 1 or curve[r - 2] < 0.5
    assert found.trained_parameters == sum(r * r for r in found.rank_pattern.values())


def test_layers_that_need_more_than_was_measured_are_named(report: InitReport) -> None:
    found = report.suggest_ranks(energy=1.0)
    assert any("gate" in name for name in found.short)
    assert all(found.rank_pattern[name] == 48 for name in found.short if "gate" in name)


@pytest.mark.parametrize("parameters", [14, 500, 3000])
def test_a_budget_is_kept_and_used(report: InitReport, parameters: int) -> None:
    found = report.suggest_ranks(parameters=parameters)
    assert found.trained_parameters <= parameters
    equal = max(1, int((parameters / len(report.layers)) ** 0.5))
    even = sum(layer.curve_sign[equal - 1] for layer in report.layers) / len(report.layers)
    assert found.energy >= even - 1e-9


def report_of(**curves: tuple[float, ...]) -> InitReport:
    """A report of layers, by their names, with these curves."""
    layers = [LayerReport(n, (8, 8), 3, c[-1], None, c, 0, 0.0, curve_sign=c) for n, c in curves.items()]
    return InitReport("update", "adamw", 1e-3, 1, 0, None, 0.0, layers)


def test_a_budget_goes_where_it_gains_most_per_parameter() -> None:
    """From r to r + 1 a layer needs 2r + 1 more parameters: a's 0.12 / 5 is more than b's 0.07 / 3."""
    found = report_of(a=(0.5, 0.8, 0.92), b=(0.6, 0.67, 0.70)).suggest_ranks(parameters=10)
    assert found.rank_pattern == {"a": 3, "b": 1}


def test_suggested_ranks_are_those_of_their_layers() -> None:
    """A pattern matches the end of a name, and no rank exceeds the kernels' maximum."""
    curves = {"proj": (0.9,), "enc.proj": (0.1, 0.9), "wide": tuple(i / 300 for i in range(1, 301))}
    found = report_of(**curves).suggest_ranks(energy=0.9)
    assert list(found.rank_pattern.items()) == [("enc.proj", 2), ("proj", 1), ("wide", 256)]
    assert found.energy == pytest.approx((0.9 + 0.9 + 256 / 300) / 3)
    assert found.short == ("wide",)


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
def test_bad_targets_are_refused(report: InitReport, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.suggest_ranks(**options)


def test_stability_of_equal_halves_is_one() -> None:
    batch = text(1, 12, 0)
    _, twice = started(batches=[batch, batch], stability=True)
    assert twice.stability == pytest.approx(1.0, abs=1e-3)
    _, other = started(batches=[batch, text(1, 12, 1)], stability=True)
    assert 0 < other.stability < 0.9
    _, plain = started(batches=[batch, text(1, 12, 1)])
    assert plain.stability is None
    assert [layer.energy_sign for layer in plain.layers] == [layer.energy_sign for layer in other.layers]


def test_every_picture_is_a_png(report: InitReport, tmp_path: Path) -> None:
    data_free = lorasb.initialize(lorasb.patch(make("llama"), r=4, init="kaiming"), progress=False)
    for kind in ("layers", "ranks", "spectrum"):
        report.plot(tmp_path / f"{kind}.png", kind)
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ValueError, match="takes no gradient: there is no energy to draw"):
            data_free.plot(tmp_path / "no.png", kind)
    with pytest.raises(ValueError, match="kind must be one of layers, ranks, spectrum, got 'pie'"):
        report.plot(tmp_path / "no.png", "pie")
    assert not (tmp_path / "no.png").exists()
