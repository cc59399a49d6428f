"""Figure 2: training loss of LoRA-SB and LoRA-XS at equal r, each at the best rate of its sweep, over seeds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import write_csv
from benchmarks.common.figures import panels, save_panels
from benchmarks.common.tables import show
from benchmarks.research.methods import grid, rows, runner
from benchmarks.research.methods.grid import METHODS, TASKS, Task
from benchmarks.research.methods.tables import spread
from lorasb.utils.plotting import GRAD, SIGN

COLORS = {"LoRA-SB": GRAD, "LoRA-XS": SIGN}
Curve = list[tuple[float, float]]  # mean and standard deviation over seeds, by point


def read(path: Path) -> list[dict[str, Any]]:
    """All curves of `methods-curves.jsonl`."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(task: Task, method: str, r: int, there: Sequence[dict[str, str]], curves: Sequence[dict[str, Any]]) -> Curve:
    """Return the curve of the test runs at the best rate; empty if they have not run yet."""
    rate = grid.best_rate(task, METHODS[method], r, there)
    wanted = (task.name, "test", method, r, rate, "")
    names = ("task", "split", "method", "r", "lr", "variant")
    found = {line["seed"]: line["losses"] for line in curves if tuple(line[name] for name in names) == wanted}
    return [spread(losses) for losses in zip(*found.values(), strict=True)]


def by_task(there: Sequence[dict[str, str]], curves: Sequence[dict[str, Any]]) -> list[tuple[Task, dict[str, Curve]]]:
    """Tasks of which both methods have run at the largest rank."""
    found = []
    for task in TASKS.values():
        both = {method: curve(task, method, task.ranks[-1], there, curves) for method in COLORS}
        if all(both.values()):
            found.append((task, both))
    return found


def plot(found: Sequence[tuple[Task, dict[str, Curve]]], path: Path) -> None:
    """Draw a panel per task."""
    figure, axes = panels(1, len(found), (max(5, 3.6 * len(found)), 3.6))
    for one, (task, both) in zip(axes, found, strict=True):
        for method, points in both.items():
            steps = [(i + 0.5) * task.steps / len(points) for i in range(len(points))]
            means = [mean for mean, _ in points]
            one.plot(steps, means, color=COLORS[method], label=f"{method}, r={task.ranks[-1]}", linewidth=1.6)
            low, high = ([mean + sign * sd for mean, sd in points] for sign in (-1, 1))
            one.fill_between(steps, low, high, color=COLORS[method], alpha=0.2, linewidth=0)
        one.set(title=task.name, xlabel="step")
        one.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("training loss (nats)")
    figure.suptitle(f"Training loss, mean ± sd of {len(grid.SEEDS)} seeds, each method at its best rate", fontsize=10)
    save_panels(figure, axes, path, grid=False)


def render(there: Sequence[dict[str, str]], curves: Sequence[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Write the CSV and the picture; return a line per point."""
    found = by_task(there, curves)
    lines = [
        {"task": task.name, "method": method, "r": task.ranks[-1], "point": i, "loss": mean, "loss_sd": deviation}
        for task, both in found
        for method, points in both.items()
        for i, (mean, deviation) in enumerate(points)
    ]
    if lines:
        write_csv(output / "figure-2.csv", lines)
        plot(found, output / "figure-2.png")
    return lines


def ends(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row a task: the first point and the mean of the last five, of both methods."""
    found = []
    for task, r in dict.fromkeys((line["task"], line["r"]) for line in lines):
        row = [task, str(r)]
        for method in COLORS:
            losses = [line["loss"] for line in lines if (line["task"], line["method"]) == (task, method)]
            row += [f"{losses[0]:.3f}", f"{statistics.fmean(losses[-5:]):.3f}"]
        found.append(row)
    return found


HEAD = ("task", "r", "LoRA-SB, first point", "LoRA-SB, last five", "LoRA-XS, first point", "LoRA-XS, last five")


def main(options: argparse.Namespace) -> None:
    """Write, draw and print what has run."""
    there, curves = rows.read(options.output / runner.ROWS), read(options.output / runner.CURVES)
    if not (lines := render(there, curves, options.output)):
        raise SystemExit("no task has both LoRA-SB and LoRA-XS yet: python -m benchmarks.research.methods first")
    show("Training loss (Figure 2)", HEAD, ends(lines))
