"""The paper's ablations: each start's effect on the factors, energy in the subspaces, and each variant's rows."""

import functools
from typing import Any

import pytest
import tolerances
import torch
from compared_methods import ETA, SHORT, R, cell_of, problem, put
from torch import Tensor

import lorasb
from benchmarks.research.methods import run, starts
from benchmarks.research.methods.adapters import begin_again
from benchmarks.research.methods.problems import LINEARS
from benchmarks.research.paper import energy, lasting, lengths
from benchmarks.research.paper.ablations import ABLATIONS
from lorasb.init.accumulator import LayerSum
from lorasb.init.svd import MomentSketch


@functools.cache
def started(**options: Any) -> Any:
    """A model with LoRA-SB set up by a cell's options; tests do not modify it."""
    return put(problem(), cell_of(**options))


def steps(model: Any) -> dict[str, Tensor]:
    return {name: layer.get_delta_weight("default").detach() for name, layer in starts.layers(model).items()}


def test_eta_scales_the_first_step_and_nothing_else() -> None:
    plain, quarter = started(), started(eta=0.25)
    for whole, part in zip(steps(plain).values(), steps(quarter).values(), strict=True):
        tolerances.check(part, whole / 4, tolerances.fp32(R))
    assert all(not step.any() for step in steps(started(eta=0.0)).values())


def test_lengths_of_the_first_step_are_those_of_its_singular_values() -> None:
    """If a start is shortened to one step of R, 1/`start` is ‖R‖/(η·r) of the full start."""
    short, whole = started(longest_start=1.0), started(longest_start=None)
    norms, left = [], []
    for name, layer in starts.layers(whole).items():
        norms.append(float(starts.factors(layer)[1].norm()) / (ETA * R))
        left.append(float(starts.factors(starts.layers(short)[name])[1].norm()) / (norms[-1] * ETA * R))
    found = lengths.lengths(left)
    assert found["layers"] == 14
    assert (found["least"], found["most"]) == pytest.approx([max(1.0, end(norms)) for end in (min, max)], rel=1e-4)


def test_skewed_takes_the_same_step_with_a_b_that_is_not_orthonormal() -> None:
    plain, skewed = started(), started(skewed=True)
    for name, whole in steps(plain).items():
        tolerances.check(steps(skewed)[name], whole, tolerances.fp32(R))
        b, core, _ = starts.factors(starts.layers(skewed)[name])
        assert torch.equal(core, torch.eye(R))
        assert (b.t() @ b - torch.eye(R)).abs().max() > 0.1


def test_noise_of_nothing_is_the_first_step_and_much_noise_is_something_else() -> None:
    plain, none, much = (started(longest_start=None, **o) for o in ({}, {"noise": 0.0}, {"noise": 1.0}))
    for name, whole in steps(plain).items():
        tolerances.check(steps(none)[name], whole, tolerances.FACTORS)
        assert steps(much)[name].norm() > 10 * whole.norm()


def test_a_second_svd_keeps_what_was_learnt() -> None:
    """The function changes only by the new first step: the base weight now contains what R had learned."""
    one, asked = problem(), cell_of(longest_start=None)
    model = put(one, asked)
    layers = starts.layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lorasb_R["default"].add_(0.1)
    learned = {
        name: (layer.base.parameter() + layer.get_delta_weight("default")).detach() for name, layer in layers.items()
    }
    begin_again(model, one, asked, lambda count: run.drawn(one, SHORT, 0, count), 1)
    for name, layer in layers.items():
        tolerances.check(layer.base.parameter(), learned[name], tolerances.MERGE)
        energy_kept = layer.get_delta_weight("default").norm() / ETA / learned[name].numel() ** 0.5
        assert 0.3 < energy_kept < 1.0


def test_shares_of_energy_are_those_of_the_projection() -> None:
    model, found, expected = started(), {}, []
    for name, layer in starts.layers(model).items():
        b, _, a = (t.double() for t in starts.factors(layer))
        g = torch.randn(layer.out_features, layer.in_features)
        found[name.removeprefix("base_model.model.")] = g
        expected.append(float((b @ b.t() @ g.double() @ a.t() @ a).square().sum() / g.square().sum()))
    of_grad, _ = energy.shares(model, found)
    assert of_grad == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_every_variant_has_its_own_rows() -> None:
    cells = [cell for ablation in ABLATIONS.values() for variant in ablation.variants for cell in variant.cells()]
    options = {cell.key: cell.options for cell in cells}
    assert all(options[cell.key] == cell.options for cell in cells)
    plain = [cell for cell in cells if cell.variant == ""]
    assert all(cell.options == () for cell in plain)  # they share the grid's rows


def test_lorasb_is_what_the_plain_variant_runs() -> None:
    """The plain variant has no options: it is exactly what a user gets."""
    one = problem()
    mine = lorasb.patch(one.model, lorasb.LoRASBConfig(r=R, target_modules=LINEARS))
    lorasb.initialize(mine, run.drawn(one, SHORT, 0, 32), lr=ETA, num_samples=32, seed=0, progress=False)
    for name, step in steps(started()).items():
        assert torch.equal(step, steps(mine)[name])


@pytest.fixture
def bases() -> tuple[dict[str, Tensor], dict[str, lasting.Bases]]:
    """A gradient [120, 100] of rank 8 from two samples, and every start's subspaces."""
    generator = torch.Generator().manual_seed(0)
    dy, x = torch.randn(2, 4, 120, generator=generator), torch.randn(2, 4, 100, generator=generator)
    layer_sum = LayerSum(sketch=MomentSketch((120, 100), 64, 0))
    layer_sum.add(dy, x)
    weight = torch.randn(120, 100, generator=generator)
    return {"layer": layer_sum.value()}, {"layer": lasting.bases_of(weight, layer_sum, 0)}


def test_what_is_kept_is_what_lies_inside(bases: tuple[dict[str, Tensor], dict[str, lasting.Bases]]) -> None:
    kept = {(line["start"], line["r"]): line["energy"] for line in lasting.energies(*bases)}
    assert kept["G", 16] == pytest.approx(1.0, abs=1e-5)
    assert kept["per-sample", 16] == pytest.approx(1.0, abs=1e-3)
    assert kept["random", 4] == pytest.approx(4 * 4 / (120 * 100), abs=5e-3)
    for start in lasting.STARTS.keys() - {lasting.AGAIN}:
        shares = [kept[start, r] for r in lasting.RANKS]
        assert all(0 <= less <= more + 1e-6 for less, more in zip(shares, [*shares[1:], 1.0], strict=True))
    for u, v in bases[1]["layer"].values():
        for side in (u, v):
            assert torch.allclose(side.t() @ side, torch.eye(64), atol=1e-4)
