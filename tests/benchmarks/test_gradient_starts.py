"""Starts of the comparison that read gradients themselves, against dense fp64 arithmetic on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from models import make, text
from torch import Tensor

import lorasb
from benchmarks.research.methods import run, starts
from benchmarks.research.methods.adapters import optimizer, put_in, sample_count
from benchmarks.research.methods.gradients import LATER, rows, take_again, weigh_by_spread
from benchmarks.research.methods.grid import METHODS, TASKS, Cell, Task
from benchmarks.research.methods.problems import LINEARS, Problem

METHOD, R, SAMPLES = METHODS["LoRA-SB"], 4, 6
LAYER = "model.layers.0.self_attn.q_proj"


def a_task(steps: int = 4) -> Task:
    return replace(TASKS["chain_sum"], steps=steps, batch=2)


def problem() -> Problem:
    """Rows of a tiny Llama in fp64."""
    data = text(40, 12, seed=5)

    def collate(indices: Any) -> dict[str, Tensor]:
        return {key: value[list(indices)] for key, value in data.items()}

    model = make("llama").double()
    return Problem(model, list(range(40)), collate, lambda *_: (0.0, 0.0), lambda *_: 0.0, LINEARS, [], "CAUSAL_LM")


def cell(**options: Any) -> Cell:
    return Cell("chain_sum", "test", "LoRA-SB", R, 1e-3, 0, "a variant", tuple(sorted(options.items())))


def put(one: Problem, asked: Cell) -> Any:
    torch.manual_seed(0)
    return put_in(one, METHOD, asked, lambda n: run.drawn(one, a_task(), 0, n), 1)[0]


def q_proj(model: Any) -> Any:
    return next(layer for name, layer in starts.layers(model).items() if name.endswith(LAYER))


def gradient(model: Any, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """∇W by autograd on the dense weight."""
    weight.requires_grad_(True)
    (found,) = torch.autograd.grad(model.eval()(**batch).loss, weight)
    weight.requires_grad_(False)
    return found


def test_spread_divides_each_entry_by_its_root_mean_square() -> None:
    one = problem()
    model = put(one, cell(init="random"))
    batches = [one.collate(range(SAMPLES))]
    plain = make("llama").double()
    singles = [gradient(plain, plain.get_submodule(LAYER).weight, row) for row in rows(batches[0])]
    weighed = sum(singles) / torch.stack(singles).square().sum(0).sqrt()
    u, s, vt = torch.linalg.svd(torch.as_tensor(weighed))
    weigh_by_spread(model, batches, eta=1e-3)
    b, core, a = (factor.double() for factor in starts.factors(q_proj(model)))
    expected = -(u[:, :R] * s[:R]) @ vt[:R]
    step = b @ core @ a
    assert torch.allclose(step / step.norm(), expected / expected.norm(), atol=1e-5)
    assert core.norm() <= 4 * 1e-3 * R * 1.0001  # four steps of R


def test_a_later_subspace_is_that_of_the_weights_reached_and_forgets_nothing() -> None:
    one = problem()
    model, samples = put(one, cell()), [one.collate(range(SAMPLES))]
    layer = q_proj(model)
    with torch.no_grad():
        layer.lorasb_R[starts.ADAPTER].add_(0.3 * torch.randn(R, R))
        before = model.eval()(**samples[0]).logits
    merged = make("llama").double()
    with torch.no_grad():
        for name, adapted in starts.layers(model).items():
            target = merged.get_submodule(name.removeprefix("base_model.model."))
            target.weight.copy_(adapted.merged_weight([starts.ADAPTER]))
    expected = gradient(merged, merged.get_submodule(LAYER).weight, samples[0]).sign()
    trained = take_again(model, R, 0, samples)
    with torch.no_grad():
        assert torch.allclose(model.eval()(**samples[0]).logits, before, atol=1e-6)  # factors are fp32
    s = torch.linalg.svdvals(expected)
    b, a = (layer.lorasb_B[LATER].double(), layer.lorasb_A[LATER].double())
    assert float((b.t() @ expected @ a.t()).norm()) >= 0.9999 * float(s[:R].norm())
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}


def test_training_goes_on_in_the_later_subspace_alone() -> None:
    one, asked = problem(), cell(refresh=0.5, later_samples=4)
    model = put(one, asked)
    losses = run.train(model, one, a_task(), asked, 1)
    layer = q_proj(model)
    assert len(losses) == 4
    assert layer.active_adapters == [starts.ADAPTER, LATER]
    assert layer.lorasb_R[LATER].abs().max() > 0


def test_seeded_moments_are_those_of_steps_that_moved_nothing() -> None:
    one, asked = problem(), cell(seeded=True)
    model = put(one, asked)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    opt = optimizer(model, METHOD, a_task(), asked, [])
    samples = run.drawn(one, a_task(), 0, sample_count(one, run.settings(asked)))
    run.seed_moments(model, samples, opt, trained)
    assert all(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert {int(opt.state[p]["step"]) for p in trained} == {len(samples)}
    assert all(float(opt.state[p]["exp_avg_sq"].max()) > 0 for p in trained)


def test_rotation_changes_the_basis_and_no_step() -> None:
    plain, turned = (put(problem(), cell(**options)) for options in ({}, {"rotated": True}))
    b, core, a = (factor.double() for factor in starts.factors(q_proj(turned)))
    expected = [factor.double() for factor in starts.factors(q_proj(plain))]
    assert torch.allclose(b @ core @ a, expected[0] @ expected[1] @ expected[2], atol=1e-7)
    assert torch.allclose(b.t() @ b, torch.eye(R, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(a @ a.t(), torch.eye(R, dtype=torch.float64), atol=1e-5)
    assert float((core - core.diag().diag()).norm()) > 0.1 * float(core.norm())


def test_ranks_by_energy_spend_the_same_budget() -> None:
    one = problem()
    model = put(one, cell(ranks_by_energy=True))
    ranks = [layer.r[starts.ADAPTER] for layer in starts.layers(model).values()]
    assert len(set(ranks)) > 1
    assert sum(r * r for r in ranks) <= len(ranks) * R * R
    assert isinstance(next(iter(starts.layers(model).values())), lorasb.LoRASBLinear)


def test_a_batch_is_cut_into_rows_and_keeps_its_numbers() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "logits_to_keep": 2}
    first, second = rows(batch)
    assert first["input_ids"].tolist() == [[0, 1, 2]]
    assert second["input_ids"].tolist() == [[3, 4, 5]]
    assert first["logits_to_keep"] == second["logits_to_keep"] == 2
