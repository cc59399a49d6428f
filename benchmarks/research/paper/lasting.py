"""How long a start's subspace captures the gradient: its energy at W0 and after steps of full fine-tuning.

Subspaces are made at W0 from 32 samples: leading singular vectors of sign(G), G and W, leading eigenvectors of the
samples' second moments (computed again at step 10, from the same samples), and random vectors. SmolLM2-135M is then
fully fine-tuned on chain_sum. At some steps, ‖UᵀGV‖² / ‖G‖² is computed over all layers together, with the summed
gradient G of 32 other samples. Takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.csv_files import Row, write_csv
from benchmarks.common.figures import panels, save_panels
from benchmarks.common.tables import show
from benchmarks.common.timing import measured_dtype, provenance_columns
from benchmarks.research.methods.adapters import optimizer
from benchmarks.research.methods.gradients import summed
from benchmarks.research.methods.grid import METHODS, WARMUP, Cell, task_named
from benchmarks.research.methods.problems import Problem, load
from benchmarks.research.methods.run import batches, drawn, rate_share, train_step
from lorasb.init.accumulator import GradientSums, LayerSum
from lorasb.init.factorize import random_subspace
from lorasb.init.svd import MomentSketch, truncated_svd
from lorasb.utils.plotting import GRAD, INK, MUTED, SIGN

TASK, SEED, SAMPLES, RATE = task_named("chain_sum by loss"), 0, 32, 1e-4
RANKS, STEPS = (4, 16, 64), (0, 2, 5, 10, 20, 40, 75)
FILE, LATER = "lasting.csv", 10  # the step at which second moments are taken again
AGAIN = f"per-sample, step {LATER}"
STARTS = {"sign(G)": SIGN, "G": GRAD, "per-sample": "#4b8b3b", AGAIN: "#8e5ea2", "W": INK, "random": MUTED}
Bases = dict[str, tuple[Tensor, Tensor]]  # by start: U [out, r] and V [in, r], the leading columns first


def linears(problem: Problem) -> dict[str, Any]:
    """The layers that an adapter would have."""
    named = problem.model.named_modules()
    return {name: module for name, module in named if name.split(".")[-1] in problem.targets}


def bases_of(weight: Tensor, layer_sum: LayerSum, seed: int) -> Bases:
    """Every start's subspaces of one layer, at the largest rank."""
    r, total = max(RANKS), layer_sum.value()
    found = {}
    for name, matrix in (("sign(G)", total.sign()), ("G", total), ("W", weight.float())):
        u, _, vt = truncated_svd(matrix, r, seed)
        found[name] = u, vt.t()
    chance = random_subspace((weight.shape[0], weight.shape[1]), r, seed)
    return found | {"per-sample": leading(layer_sum), "random": (chance.b, chance.a.t())}


def leading(layer_sum: LayerSum) -> tuple[Tensor, Tensor]:
    """U and V of a layer's second moments, at the largest rank."""
    if layer_sum.sketch is None:
        raise RuntimeError("no second moments were taken")
    u, _, vt = layer_sum.sketch.triplets().first(max(RANKS))
    return u, vt.t()


def energies(totals: Mapping[str, Tensor], bases: Mapping[str, Bases]) -> Iterator[dict[str, Any]]:
    """Share of ‖G‖² that each start keeps at each rank, all layers together."""
    squares = sum(float(total.square().sum()) for total in totals.values())
    for start in (start for start in STARTS if start in next(iter(bases.values()))):
        cores = [bases[name][start][0].t() @ total @ bases[name][start][1] for name, total in totals.items()]
        for r in RANKS:
            yield {"start": start, "r": r, "energy": sum(float(c[:r, :r].square().sum()) for c in cores) / squares}


def measure() -> list[dict[str, Any]]:
    """Train, and look at the gradient on the way."""
    problem = load(TASK, None, torch.float32)
    layers = linears(problem)
    places = {name: i for i, name in enumerate(layers)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    samples = drawn(problem, TASK, SEED, SAMPLES)

    def with_moments() -> GradientSums:
        return summed(problem.model, layers, samples, lambda name: MomentSketch(shapes[name], max(RANKS), places[name]))

    first = with_moments()
    bases = {name: bases_of(layers[name].weight.detach(), one, places[name]) for name, one in first.sums.items()}
    others, lines = drawn(problem, TASK, SEED + 1, SAMPLES), []
    for step, loss in trained(problem):
        if step == LATER:
            for name, one in with_moments().sums.items():
                bases[name][AGAIN] = leading(one)
        totals = {name: one.value() for name, one in summed(problem.model, layers, others).sums.items()}
        lines += [{"task": TASK.name, "step": step, "loss": loss, **line} for line in energies(totals, bases)]
        print(f"step {step}: loss {loss:.3f}", flush=True)
    return lines


def trained(problem: Problem) -> Iterator[tuple[int, float]]:
    """Fully fine-tune, as in the comparison; yield each step to measure at, and the loss before it."""
    cell, warmup = Cell(TASK.name, "validation", "full", 0, RATE, SEED), round(WARMUP * TASK.steps)
    steps = optimizer(problem.model, METHODS["full"], TASK, cell, [])
    loss, wide = float("nan"), measured_dtype() == torch.bfloat16
    for step, batch in enumerate(batches(problem, TASK, SEED)):
        if step in STEPS:
            yield step, loss
        steps.param_groups[0]["lr"] = RATE * rate_share(step, TASK.steps, warmup)
        loss = train_step(problem.model, batch, steps, list(problem.model.parameters()), wide)
    yield TASK.steps, loss


def draw(lines: Sequence[Row], path: Path) -> None:
    """Draw a panel per rank, with a line per start."""
    figure, axes = panels(1, len(RANKS), (9, 3.6), sharey=True)
    for one, r in zip(axes, RANKS, strict=True):
        for start, color in STARTS.items():
            mine = [line for line in lines if line["start"] == start and int(line["r"]) == r]
            steps, shares = [int(line["step"]) for line in mine], [100 * float(line["energy"]) for line in mine]
            one.plot(steps, shares, color=color, marker="o", markersize=3, linewidth=1.5, label=start)
        one.set(xlabel=f"steps of full fine-tuning, r = {r}", ylim=(0, 100))
    axes[0].set_ylabel("energy of G in the subspace (%)")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle("What each start's subspace keeps of the gradient, chain_sum, SmolLM2-135M", fontsize=11, color=INK)
    save_panels(figure, axes, path, grid=False)


HEAD = ("start", "r", *(f"step {step}" for step in STEPS))


def shown(lines: Sequence[Row]) -> Iterator[list[str]]:
    """A row a start and rank, under `HEAD`."""
    for r in RANKS:
        for start in STARTS:
            mine = {int(line["step"]): float(line["energy"]) for line in lines if _is(line, start, r)}
            yield [start, str(r), *(f"{mine[step]:.1%}" if step in mine else "" for step in STEPS)]


def _is(line: Row, start: str, r: int) -> bool:
    return line["start"] == start and int(line["r"]) == r


def main(output: Path) -> None:
    """Measure, write, draw and print."""
    lines = [line | provenance_columns() for line in measure()]
    write_csv(output / FILE, lines)
    draw(lines, output / "lasting.png")
    show(f"Energy of G in subspaces made at W0, {TASK.name}, {TASK.model}", HEAD, shown(lines))
