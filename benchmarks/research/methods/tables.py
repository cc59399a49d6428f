"""What the rows say: mean and standard deviation over seeds, by task and method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.tables import show
from benchmarks.research.methods import grid
from benchmarks.research.methods.grid import METHODS, TASKS

Row = dict[str, str]


@dataclass(frozen=True)
class Line:
    """A method at one rank on one task: its seeds at the best rate on the test split.

    Attributes:
        kept: share of the energy of the G they were made from that the factors keep; None where none was measured.
    """

    task: str
    method: str
    r: int
    lr: float
    scores: tuple[float, ...]
    losses: tuple[float, ...]
    params: int
    seconds: float
    init_seconds: float
    memory: float
    kept: float | None = None

    @property
    def score(self) -> tuple[float, float]:
        return spread(self.scores)

    @property
    def loss(self) -> tuple[float, float]:
        return spread(self.losses)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; zero for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(mean: float, deviation: float, digits: int = 3) -> str:
    """Format a mean and its deviation for tables."""
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def lines(rows: Sequence[Row], task: str) -> list[Line]:
    """Every method's line, in the grid's order."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["task"] == task and row["split"] == "test" and not row["variant"]:
            method, r = METHODS[row["method"]], int(row["r"])
            if float(row["lr"]) == grid.best_rate(TASKS[task], method, r, rows):  # a sweep may have grown since
                found.setdefault((row["method"], r), []).append(row)
    order = list(METHODS)
    return [
        _line(task, *key, part) for key, part in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item))
    ]


def _line(task: str, method: str, r: int, part: list[Row]) -> Line:
    def numbers(name: str) -> tuple[float, ...]:
        return tuple(float(row[name]) for row in part)

    kept = [float(row["energy_grad"]) for row in part if row.get("energy_grad")]
    middle = {name: statistics.median(numbers(name)) for name in ("seconds", "init_seconds", "peak_rss_mb")}
    return Line(
        task,
        method,
        r,
        float(part[0]["lr"]),
        numbers("score"),
        numbers("loss"),
        int(part[0]["adapter_params"]),
        middle["seconds"],
        middle["init_seconds"],
        middle["peak_rss_mb"],
        statistics.fmean(kept) if kept else None,
    )


def show_all(rows: Sequence[Row]) -> None:
    """Print a table per task, of what has run."""
    for name, task in TASKS.items():
        if found := lines(rows, name):
            arrow = "higher" if task.higher_is_better else "lower"
            size = f"{task.steps} steps of {task.batch}, {task.test} test examples"
            title = f"{name}: {task.metric} ({arrow} is better), mean ± standard deviation; {size}"
            head = ("method", "r", "lr", "seeds", "trained", task.metric, "loss", "init s", "train s", "peak MB")
            show(title, head, map(_cells, found), width=120)


def _cells(line: Line) -> list[str]:
    return [
        line.method,
        str(line.r or "-"),
        f"{line.lr:g}",
        str(len(line.scores)),
        f"{line.params:,}",
        plus_minus(*line.score),
        plus_minus(*line.loss),
        f"{line.init_seconds:.1f}",
        f"{line.seconds:.0f}",
        f"{line.memory:.0f}",
    ]
