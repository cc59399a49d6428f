"""The comparison of methods: its grid, rows, scores and counts, every method on a tiny model, and starts that read gradients."""

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import transformers
from compared_methods import SHORT, R, cell_of, problem, put, row
from models import logits, make
from rich.console import Console
from tiny_run import write_rows
from torch import Tensor

import lorasb
from benchmarks.research.methods import gradients, grid, rows, run, runner, starts, tables
from benchmarks.research.methods.adapters import optimizer, sample_count
from benchmarks.research.methods.gradients import LATER, take_again, weigh_by_spread, whiten
from benchmarks.research.methods.grid import FULL, METHODS, TASKS, Cell
from benchmarks.research.methods.problems import Problem, examples
from benchmarks.research.paired.grid import entries

TASK = TASKS["chain_sum"]


def swept(path: Path, method: str, losses: dict[float, float]) -> None:
    for lr, loss in losses.items():
        rows.append(path, row(Cell(TASK.name, "validation", method, TASK.rank, lr, 0), loss))


def test_every_method_gets_as_many_rates() -> None:
    for task in TASKS.values():
        assert {len(rates.start) for rates in task.rates.values()} == {3}
        cells = [list(grid.sweep(task, method, [])) for method in METHODS.values()]
        assert [len(part) for part in cells] == [3 * len(grid.ranks(task, method)) for method in METHODS.values()]
        assert len({cell.key for part in cells for cell in part}) == sum(map(len, cells))


def test_a_sweep_goes_outward_while_the_best_is_at_its_edge() -> None:
    rates = grid.Rates((1.0, 2.0, 4.0, 8.0, 16.0, 32.0), 1)

    def after(tried: dict[float, float]) -> tuple[float, ...]:
        return rates.next({lr: (loss,) for lr, loss in tried.items()})

    assert after({}) == (2.0, 4.0, 8.0)
    assert after({2.0: 0.5, 8.0: 0.5}) == (4.0,)
    tried = {2.0: 0.5, 4.0: 0.4, 8.0: 0.3}
    assert after(tried) == (16.0,)
    assert after(tried | {16.0: 0.2}) == (32.0,)
    assert after(tried | {16.0: 0.2, 32.0: 0.1}) == ()  # the ladder ends
    assert after(tried | {16.0: 0.35}) == ()
    assert after(tried | {16.0: math.nan}) == ()
    assert after({2.0: 0.1, 4.0: 0.4, 8.0: 0.3}) == (1.0,)
    assert after({2.0: 0.2, 4.0: 0.1, 8.0: 0.3}) == ()
    assert after({2.0: math.nan, 3.0: 0.0, 4.0: 0.1, 8.0: 0.3}) == ()  # 2 diverged, 3 is not on the ladder


def test_seeds_run_at_the_best_rate_and_what_is_there_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, method = tmp_path / "rows.csv", METHODS["LoRA"]
    low, middle, high = TASK.rates[grid.LOW].start
    swept(path, "LoRA", {low: 0.5, high: 0.4})
    (missing,) = grid.sweep(TASK, method, rows.read(path))
    assert missing.lr == middle
    assert list(grid.finals(TASK, method, rows.read(path))) == []
    swept(path, "LoRA", {middle: 0.3})
    assert list(grid.sweep(TASK, method, rows.read(path))) == []
    finals = list(grid.finals(TASK, method, rows.read(path)))
    assert {cell.lr for cell in finals} == {middle}
    assert [cell.seed for cell in finals] == list(grid.SEEDS)
    for cell, loss in zip(finals, (0.1, 0.2, 0.3), strict=True):
        rows.append(path, row(cell, loss))
    stale = Cell(TASK.name, "test", "LoRA", TASK.rank, low, 0)
    rows.append(path, row(stale, 9.0))  # from a sweep that has grown since
    assert rows.missing(finals, rows.read(path)) == []
    (line,) = tables.lines(rows.read(path), TASK.name)
    assert line.loss == pytest.approx((0.2, 0.1))
    tables.show_all(rows.read(path))
    assert "0.200 ± 0.100" in capsys.readouterr().out


def test_a_failed_run_is_told_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = list(grid.sweep(TASK, METHODS["LoRA"], []))

    def start(cell: Cell, options: argparse.Namespace) -> dict[str, object]:
        if cell == cells[1]:
            raise RuntimeError("out of memory")
        return {**row(cell, 0.5), "losses": [1.0]}

    monkeypatch.setattr(runner, "start", start)
    console = Console(record=True)
    runner.run_all(
        lambda there: cells, argparse.Namespace(rows="methods.csv", output=tmp_path, minutes=1, workers=2), console
    )
    assert {found["lr"] for found in rows.read(tmp_path / runner.ROWS)} == {str(cells[0].lr), str(cells[2].lr)}
    assert "out of memory" in console.export_text()


def test_a_sweep_by_score_breaks_ties_by_loss(tmp_path: Path) -> None:
    task, method, path = TASKS["cola"], METHODS["LoRA"], tmp_path / "rows.csv"
    rates = task.rates[grid.LOW].start
    for lr, loss, score in zip(rates, (0.5, 0.7, 0.6), (0.1, 0.3, 0.3), strict=True):
        cell = Cell(task.name, "validation", "LoRA", task.rank, lr, 0)
        rows.append(path, {**row(cell, loss), "score": score})
    there = rows.read(path)
    (further,) = grid.sweep(task, method, there)
    assert further.lr > rates[2]  # the last of the three is the best
    rows.append(path, {**row(further, 0.4), "score": 0.0})
    assert grid.best_rate(task, method, task.rank, rows.read(path)) == rates[2]


def test_curves_are_means_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    cell = next(grid.sweep(TASK, METHODS["LoRA"], []))
    rows.append_curve(path, {**cell.described(), "losses": [1.0, 3.0, 2.0, 4.0, 5.0]}, points=3)
    assert '"losses": [2.0, 3.0, 5.0]' in path.read_text(encoding="utf-8")


def test_no_split_has_an_example_of_more_tokens_than_its_task_takes(tiny: Path, tmp_path: Path) -> None:
    """The tokenizer has one token per word."""
    task = replace(TASKS["gsm8k"], longest=6, examples=5, validation=3, test=4)
    for part in ("train", "test"):
        lines = [{"prompt": f"{part}{i} " * (1 + i % 4), "completion": "one two"} for i in range(40)]
        write_rows(tmp_path / f"gsm8k.{part}.jsonl", lines)
    found = examples(task, tmp_path, transformers.AutoTokenizer.from_pretrained(tiny))
    assert {name: len(part) for name, part in found.items()} == {"train": 5, "validation": 3, "test": 4}
    sizes = [len(example.prompt.split()) for part in found.values() for example in part]
    assert max(sizes) == 3  # plus two of the answer and an end token
    assert not {e.prompt for e in found["train"]} & {e.prompt for e in found["validation"]}


pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's LoRA-GA


def named(name: str) -> Cell:
    return cell_of(name, r=0 if METHODS[name].family == FULL else R)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "LoRA-Pro"])  # which no target installs
def test_a_method_starts_at_the_base_models_function_and_trains_its_own_on_the_same_batches(name: str) -> None:
    """PiSSA and LoRA-GA subtract from the base weight what their factors add."""
    seen: list[tuple[int, ...]] = []
    one, asked = problem(seen), named(name)
    model = put(one, asked)
    if not name.startswith("LoRA-SB"):  # LoRA-SB's R starts at the first step
        tolerances.check(logits(model.eval()), logits(make("llama")), tolerances.fp32(4096))
    assert all(p.grad is None for p in model.parameters())  # initialization leaves no gradients behind
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    seen.clear()
    losses = run.train(model, one, SHORT, asked, 1)
    order = list(range(40))
    random.Random(asked.seed).shuffle(order)
    assert seen == [tuple(order[i : i + 2]) for i in range(0, 8, 2)]
    assert len(losses) == SHORT.steps
    assert all(loss == loss for loss in losses)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    own = "weight" if name == "full" else "lorasb_R" if name.startswith(("LoRA-SB", "LoRA-XS")) else "lora_"
    assert moved
    assert all(own in key for key in moved)


@pytest.mark.parametrize("name", ["LoRA", "LoRA-SB", "full"])
def test_a_head_has_its_own_rate(name: str) -> None:
    asked = named(name)
    model = put(problem(), asked)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".norm." in key)
    task = replace(SHORT, head_lr=0.125)
    opt = optimizer(model, METHODS[name], task, asked, ["norm"])
    rates = {id(p): group["lr"] for group in opt.param_groups for p in group["params"]}
    found = {key: rates[id(p)] for key, p in model.named_parameters() if p.requires_grad}
    assert {rate for key, rate in found.items() if ".norm." in key} == {0.125}
    assert {rate for key, rate in found.items() if ".norm." not in key} == {asked.lr}


def test_batches_of_like_length_leave_no_example_out() -> None:
    one = problem()
    plain = run.epoch(one, 2, random.Random(3))
    one.lengths = lengths = [10 + 7 * i % 13 for i in one.train]
    grouped = run.epoch(one, 2, random.Random(3))
    for batches in (plain, grouped):
        assert sorted(i for batch in batches for i in batch) == one.train
    assert grouped != run.epoch(one, 2, random.Random(4))

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[i] for batch in batches for i in batch)

    assert padding(grouped) < padding(plain) / 2


SAMPLES, LAYER = 6, "model.layers.0.self_attn.q_proj"


def fp64_problem() -> Problem:
    return problem(dtype=torch.float64)


def q_proj_factors(model: Any) -> list[Tensor]:
    """B, R and A of q_proj, in fp64."""
    return [factor.double() for factor in starts.factors(q_proj(model))]


def orthonormal(columns: Tensor) -> bool:
    return torch.allclose(columns.t() @ columns, torch.eye(R, dtype=torch.float64), atol=1e-5)


def q_proj(model: Any) -> Any:
    return next(layer for name, layer in starts.layers(model).items() if name.endswith(LAYER))


def gradient(model: Any, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """∇W by autograd on the dense weight."""
    weight.requires_grad_(True)
    (found,) = torch.autograd.grad(model.eval()(**batch).loss, weight)
    weight.requires_grad_(False)
    return found


def test_spread_divides_each_entry_by_its_root_mean_square() -> None:
    one = fp64_problem()
    model = put(one, cell_of(init="random"))
    batches = [one.collate(range(SAMPLES))]
    plain = make("llama").double()
    singles = [gradient(plain, plain.get_submodule(LAYER).weight, row) for row in gradients.rows(batches[0])]
    weighed = sum(singles) / torch.stack(singles).square().sum(0).sqrt()
    u, s, vt = torch.linalg.svd(torch.as_tensor(weighed))
    weigh_by_spread(model, batches, eta=1e-3)
    b, core, a = q_proj_factors(model)
    expected = -(u[:, :R] * s[:R]) @ vt[:R]
    step = b @ core @ a
    assert torch.allclose(step / step.norm(), expected / expected.norm(), atol=1e-5)
    assert core.norm() <= 4 * 1e-3 * R * 1.0001  # four steps of R


def test_whitening_takes_both_kronecker_factors() -> None:
    one = fp64_problem()
    model, batch = put(one, cell_of(init="random")), one.collate(range(SAMPLES))
    plain, kept = make("llama").double().requires_grad_(False).eval(), {}
    layer = plain.get_submodule(LAYER)
    layer.weight.requires_grad_(True)
    layer.register_forward_hook(lambda module, inputs, output: kept.update(x=inputs[0], y=output))
    loss = plain(**batch).loss
    (dy,) = torch.autograd.grad(SAMPLES * loss, kept["y"])
    x, dy = (part.detach().flatten(0, 1) for part in (kept["x"], dy))
    x = x[dy.any(1)]
    dy = dy[dy.any(1)]

    def inverse_root(m: Tensor) -> Tensor:
        damped = m + gradients.DAMPING * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype)
        values, vectors = torch.linalg.eigh(damped)
        return vectors @ torch.diag(values**-0.5) @ vectors.t()

    left, right = inverse_root(dy.t() @ dy), inverse_root(x.t() @ x)
    u, _, vt = torch.linalg.svd(left @ dy.t() @ x @ right)
    whiten(model, [batch])
    b, core, a = q_proj_factors(model)
    assert not core.any()
    for found, expected in ((b, left @ u[:, :R]), (a.t(), right @ vt[:R].t())):
        basis = torch.linalg.qr(expected).Q
        assert orthonormal(found)
        assert torch.allclose(basis @ basis.t() @ found, found, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("name", [*(name for name, one in entries().items() if "peft" in one.options), "LoRA r=3"])
def test_adapters_of_peft_are_put_in_with_their_options(name: str) -> None:
    entry, one = entries()[name], problem(dtype=torch.float32)
    if "vector_length" in entry.options:  # has to divide the layers' sizes, here smaller than SmolLM2's
        entry = replace(entry, options={**entry.options, "vector_length": 16, "num_vectors": 16})
    model = put(one, entry.cell("chain_sum", "test", entry.rank(16), 1e-3, 0))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert type(model).__name__.startswith("PeftModel")
    assert trained
    assert all(".default" in name for name in trained)
    assert torch.isfinite(model(**one.collate(range(SAMPLES))).loss)


def test_a_later_subspace_is_that_of_the_weights_reached_and_forgets_nothing() -> None:
    one = fp64_problem()
    model, samples = put(one, cell_of()), [one.collate(range(SAMPLES))]
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
    one, asked = fp64_problem(), cell_of(refresh=0.5, later_samples=4)
    model = put(one, asked)
    losses = run.train(model, one, SHORT, asked, 1)
    layer = q_proj(model)
    assert len(losses) == 4
    assert layer.active_adapters == [starts.ADAPTER, LATER]
    assert layer.lorasb_R[LATER].abs().max() > 0


def test_seeded_moments_are_those_of_steps_that_moved_nothing() -> None:
    one, asked = fp64_problem(), cell_of(seeded=True)
    model = put(one, asked)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    opt = optimizer(model, METHODS[asked.method], SHORT, asked, [])
    samples = run.drawn(one, SHORT, 0, sample_count(one, run.settings(asked)))
    run.seed_moments(model, samples, opt, trained)
    assert all(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert {int(opt.state[p]["step"]) for p in trained} == {len(samples)}
    assert all(float(opt.state[p]["exp_avg_sq"].max()) > 0 for p in trained)


def test_rotation_changes_the_basis_and_no_step() -> None:
    plain, turned = (q_proj_factors(put(fp64_problem(), cell_of(**options))) for options in ({}, {"rotated": True}))
    b, core, a = turned
    assert torch.allclose(b @ core @ a, plain[0] @ plain[1] @ plain[2], atol=1e-7)
    assert orthonormal(b)
    assert orthonormal(a.t())
    assert float((core - core.diag().diag()).norm()) > 0.1 * float(core.norm())


def test_ranks_by_energy_spend_the_same_budget() -> None:
    model = put(fp64_problem(), cell_of(ranks_by_energy=True))
    ranks = [layer.r[starts.ADAPTER] for layer in starts.layers(model).values()]
    assert len(set(ranks)) > 1
    assert sum(r * r for r in ranks) <= len(ranks) * R * R
    assert isinstance(next(iter(starts.layers(model).values())), lorasb.LoRASBLinear)


def test_a_batch_is_cut_into_rows_and_keeps_its_numbers() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "logits_to_keep": 2}
    first, second = gradients.rows(batch)
    assert first["input_ids"].tolist() == [[0, 1, 2]]
    assert second["input_ids"].tolist() == [[3, 4, 5]]
    assert first["logits_to_keep"] == second["logits_to_keep"] == 2
