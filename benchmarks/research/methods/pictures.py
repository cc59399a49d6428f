"""Pictures of the grid: validation loss over learning rates, over ranks, and over samples of the initialization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.common.figures import panels, save_panels
from benchmarks.research.methods.grid import SGD, TASKS
from lorasb.utils.plotting import GRAD, INK, SIGN

Row = dict[str, str]
COLORS = {"LoRA-SB": GRAD, SGD: "#b0527a", "LoRA-XS": SIGN, "LoRA": "#6b7280", "full": INK}
DASHES = ("-", "--", ":")


def curves(rows: Sequence[Row], task: str) -> dict[tuple[str, int], dict[float, float]]:
    """Validation loss by learning rate, for every method and rank that is drawn."""
    found: dict[tuple[str, int], dict[float, float]] = {}
    for row in rows:
        if (
            (row["task"], row["split"], row["variant"]) == (task, "validation", "")
            and row["method"] in COLORS
            and row["seed"] == "0"
        ):
            found.setdefault((row["method"], int(row["r"])), {})[float(row["lr"])] = float(row["loss"])
    return found


def samples(rows: Sequence[Row], task: str) -> dict[int, list[float]]:
    """Validation losses by samples of the initialization, one a seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        name, _, count = row["variant"].partition("=")
        if row["task"] == task and row["split"] == "validation" and name == "samples":
            found.setdefault(int(count), []).append(float(row["loss"]))
    return found


def choosing(rows: Sequence[Row], task: str, path: Path) -> None:
    """Three panels: learning rate, rank, samples."""
    figure, axes = panels(1, 3, (11, 3.6), sharey=True)
    found = curves(rows, task)
    _rates(axes[0], found)
    _ranks(axes[1], found)
    _samples(axes[2], samples(rows, task))
    axes[0].set_ylabel("validation loss (nats per token)")
    plain_log(axes[0].yaxis)
    it = TASKS[task]
    run = f"{it.steps} steps of {it.batch}, n = {it.validation} held-out"
    figure.suptitle(f"{task}: {it.model}, {run}; rates and ranks: one seed", fontsize=10)
    save_panels(figure, axes, path, dpi=130)


FINEST, FINER = (tuple(1 + i / parts for i in range(9 * parts)) for parts in (10, 5))
FINE, SOME, FEW = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0), (1.0, 2.0, 5.0), (1.0, 3.0)


def plain_log(axis: Any, decades: tuple[float, float] = (0.8, 1.6)) -> None:
    """A logarithmic axis with plain numbers on it: the fewer of every power of ten, the more `decades` it spans.

    Call it when all is drawn.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    span = math.log10(high / low)
    limits = {0.06: FINEST, 0.2: FINER, decades[0]: FINE, decades[1]: SOME}
    subs = next((found for limit, found in limits.items() if span < limit), FEW)
    axis.set_major_locator(LogLocator(subs=subs, numticks=40))  # more than there are: it thins to no plain numbers
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _rates(axes: Any, found: Mapping[tuple[str, int], dict[float, float]]) -> None:
    """Colors are methods, dashes ranks, largest first."""
    by_name = sorted({name for name, _ in found}, key=list(COLORS).index)
    styles: dict[int, str] = {}
    for method in by_name:
        ranks = sorted((r for name, r in found if name == method), reverse=True)
        for r, style in zip(ranks, cycle(DASHES), strict=False):
            rates = sorted(found[method, r])
            losses = [found[method, r][lr] for lr in rates]
            axes.plot(rates, losses, style, color=COLORS[method], marker="o", ms=4)
            if len(ranks) > 1:
                styles[r] = style
        label = f"{method}, r={ranks[0]}" if len(ranks) == 1 and ranks[0] else method
        axes.plot([], [], "-o", color=COLORS[method], ms=4, label=label)
    for r, style in styles.items():
        axes.plot([], [], style, color=INK, label=f"r={r}")
    plain_log(axes.xaxis)
    axes.set(xlabel="peak learning rate (AdamW)")
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def _ranks(axes: Any, found: Mapping[tuple[str, int], dict[float, float]]) -> None:
    for method in ("LoRA-SB", SGD, "LoRA-XS"):
        best = {r: min(losses.values()) for (name, r), losses in found.items() if name == method}
        if best:
            axes.plot(sorted(best), [best[r] for r in sorted(best)], "-o", color=COLORS[method], ms=4, label=method)
    axes.set(xlabel="rank r, each at its best rate")
    axes.legend(frameon=False, fontsize=7)


def _samples(axes: Any, found: Mapping[int, list[float]]) -> None:
    counts = sorted(found)
    means = [sum(found[count]) / len(found[count]) for count in counts]
    axes.plot(counts, means, "-o", color=COLORS["LoRA-SB"], ms=4, label="LoRA-SB, r=64")
    for count in counts:
        axes.plot([count] * len(found[count]), found[count], ".", color=COLORS["LoRA-SB"], alpha=0.4, ms=4)
    axes.set(xscale="log", xlabel="samples of the initialization")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_formatter(lambda value, place: "")
    axes.legend(frameon=False, fontsize=7)
