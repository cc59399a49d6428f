"""Does a subspace that keeps more of the gradient train better? Energy captured against the final loss.

The reference is G over problems outside all splits (chain_sum, the model before training), by plain autograd
in fp32. For every start, it measures the share of ‖G‖² and of ‖sign(G)‖² within its subspace, ‖QᵦᵀG Qₐ‖²/‖G‖² with
orthonormal bases of B's columns and A's rows, and shows it with the validation loss after training from this start.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.csv_files import Row, write_csv
from benchmarks.common.figures import panels, save_panels
from benchmarks.common.tables import show
from benchmarks.common.timing import measured_dtype, provenance_columns
from benchmarks.research.methods import grid, rows, runner, starts
from benchmarks.research.methods.adapters import put_in
from benchmarks.research.methods.grid import METHODS, SGD, TASKS, WARMUP, Cell
from benchmarks.research.methods.pictures import plain_log
from benchmarks.research.methods.problems import MAX_LENGTH, Problem, generated, load
from benchmarks.research.methods.run import drawn
from benchmarks.research.methods.tables import plus_minus, spread
from benchmarks.research.paper.ablations import ABLATIONS, results
from lorasb.app.data import Example, generate
from lorasb.app.prepare import demo_model
from lorasb.app.tokenize import encode
from lorasb.utils.plotting import GRAD, INK, SIGN

TASK, REFERENCE, SEED = TASKS["chain_sum"], 200, 77
KINDS = {  # prefix of a start's label: (marker, what its factors are made from)
    SGD: ("s", "G (sgd)"),
    "LoRA-SB": ("o", "sign(G) (LoRA-SB)"),
    "samples": ("P", "sign(G), 1 to 200 samples"),
    "noise": ("X", "sign(G) and noise"),
    "LoRA-XS": ("^", "W, B = U Σ (LoRA-XS)"),
    "W, B = U": ("v", "W, B = U"),
    "Kaiming": ("D", "Kaiming"),
}


@dataclass(frozen=True)
class Start:
    """A start and how training with it ended."""

    label: str
    cell: Cell
    losses: tuple[float, ...]


def known(there: Sequence[Row]) -> Iterator[Start]:
    """Every start that has been trained with."""
    for method in ("LoRA-SB", SGD, "LoRA-XS"):
        for r in TASK.ranks:
            if (lr := grid.best_rate(TASK, METHODS[method], r, there)) is not None:
                cell = Cell(TASK.name, "validation", method, r, lr, 0)
                yield Start(f"{method}, r={r}", cell, losses(cell, there))
    seen: set[tuple[str, ...]] = set()
    for name in ("starts", "samples", "subspace"):
        for variant in ABLATIONS[name].variants:
            cell = next(variant.cells())
            if (
                (found := results(variant, there))
                and cell.key not in seen
                and variant.options
                and len(variant.seeds) > 1
            ):
                seen.add(cell.key)
                label = f"{readable(variant.name)}, r={variant.r}"
                yield Start(label, cell, tuple(float(row["loss"]) for row in found.values()))


def losses(cell: Cell, there: Sequence[Row]) -> tuple[float, ...]:
    """Return the losses of all seeds at this rate: the sweep's, and those of ablations."""
    wanted = [replace(cell, seed=seed).key for seed in grid.SEEDS]
    return tuple(float(row["loss"]) for row in there if rows.key(row) in wanted)


def readable(variant: str) -> str:
    """An ablation's name in the rows, for people."""
    return {"flat=True": "W, B = U", "init=kaiming": "Kaiming"}.get(variant, variant.replace("=", " "))


def unseen() -> list[Example]:
    """Problems that are in no split."""
    taken = [example for part in generated(TASK).values() for example in part]
    return generate(TASK.name, REFERENCE, SEED, exclude=taken)


def reference(problem: Problem) -> dict[str, Tensor]:
    """G of every adapted weight, in fp32."""
    from transformers import AutoTokenizer

    model = copy.deepcopy(problem.model).float()
    weights = {n: p for n, p in model.named_parameters() if n.split(".")[-2] in problem.targets}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    for example in unseen():  # one by one: a mean over each example's tokens, as in the initialization
        model(**problem.collate([encode(example, tokenizer, MAX_LENGTH)])).loss.backward()
    return {name.removesuffix(".weight"): weight.grad for name, weight in weights.items() if weight.grad is not None}


def shares(model: Any, gradients: dict[str, Tensor]) -> tuple[float, float]:
    """Means over layers of the share of ‖G‖² and of ‖sign(G)‖² that the factors' subspaces keep."""
    of_grad: list[float] = []
    of_sign: list[float] = []
    for name, layer in starts.layers(model).items():
        g = next(value for key, value in gradients.items() if name.endswith(key))
        left = torch.linalg.qr(layer.lorasb_B[starts.ADAPTER].detach().float()).Q
        right = torch.linalg.qr(layer.lorasb_A[starts.ADAPTER].detach().float().t()).Q
        for found, matrix in ((of_grad, g), (of_sign, g.sign())):
            found.append(float((left.t() @ matrix @ right).square().sum() / matrix.square().sum()))
    return sum(of_grad) / len(of_grad), sum(of_sign) / len(of_sign)


def measure(there: Sequence[Row], folder: Path | None) -> list[dict[str, Any]]:
    """A line a start."""
    problem, at = load(TASK, folder, measured_dtype()), provenance_columns()
    gradients, base, lines = reference(problem), problem.model, []
    for start in known(there):
        problem.model = copy.deepcopy(base)
        cell, warmup = start.cell, round(WARMUP * TASK.steps)
        model, _, _ = put_in(problem, METHODS[cell.method], cell, lambda n: drawn(problem, TASK, 0, n), warmup)
        of_grad, of_sign = shares(model, gradients)
        loss, deviation = spread(start.losses)
        lines.append(
            {
                "start": start.label,
                "r": cell.r,
                "lr": cell.lr,
                "seeds": len(start.losses),
                "loss": loss,
                "loss_sd": deviation,  # 0 of one seed
                "energy_grad": of_grad,
                "energy_sign": of_sign,
                **at,
            }
        )
    return lines


def loss_of(line: Mapping[str, Any]) -> str:
    """Format the mean loss, with its standard deviation if there are several seeds."""
    mean, deviation = float(line["loss"]), float(line["loss_sd"])
    return plus_minus(mean, deviation) if deviation else f"{mean:.3f}"


def cells(line: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    energies = (f"{line[name]:.1%}" for name in ("energy_grad", "energy_sign"))
    return [line["start"], f"{line['lr']:g}", str(line["seeds"]), *energies, loss_of(line)]


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw two panels: energy of G, and of sign(G)."""
    figure, axes = panels(1, 2, (11, 4.6), sharey=True)
    colors = dict(zip(TASK.ranks, (SIGN, INK, GRAD), strict=True))
    for one, (key, what) in zip(axes, (("energy_grad", "G"), ("energy_sign", "sign(G)")), strict=True):
        for line in lines:
            _point(one, line, key, colors[line["r"]])
        one.set_xlabel(f"energy of {what} that the subspace keeps (%), {REFERENCE} unseen samples")
        plain_log(one.yaxis)
    _legends(axes, colors)
    axes[0].set_ylabel("held-out loss after training (nats per token)")
    figure.suptitle(
        f"{TASK.name}: energy captured against the loss reached "
        f"(n = {TASK.validation} problems; mean ± sd of 3 seeds; no bar: one seed)",
        fontsize=10,
    )
    save_panels(figure, axes, path)


def _point(panel: Any, line: Mapping[str, Any], key: str, color: str) -> None:
    marker = next(mark for start, (mark, _) in KINDS.items() if line["start"].startswith(start))
    error = line["loss_sd"] or None  # one seed has none
    panel.errorbar(100 * line[key], line["loss"], error, fmt=marker, color=color, ms=7, capsize=3, alpha=0.8)


def _legends(axes: Sequence[Any], colors: Mapping[int, str]) -> None:
    """Add legends: ranks in the first panel, starts in the second."""
    for r, color in colors.items():
        axes[0].plot([], [], "o", color=color, label=f"r = {r}")
    for marker, label in KINDS.values():
        axes[1].plot([], [], marker, color=INK, label=label)
    for one in axes:
        one.legend(frameon=False, fontsize=8, loc="upper right")


def main(options: argparse.Namespace) -> None:
    """Measure, print, write and draw."""
    lines = measure(rows.read(options.output / runner.ROWS), options.data_dir)
    if not lines:
        raise SystemExit("nothing has been trained yet: python -m benchmarks.research.methods first")
    title = f"Energy of {REFERENCE} unseen samples' gradient in the subspace, and the loss after training"
    head = ("start", "lr", "seeds", "energy of G", "energy of sign(G)", "loss")
    show(title, head, map(cells, sorted(lines, key=lambda line: line["loss"])))
    write_csv(options.output / "energy.csv", lines)
    plot(lines, options.output / "energy.png")
