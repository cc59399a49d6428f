"""Pictures of the grid: test scores of every method, and validation loss by learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import Row
from benchmarks.common.figures import panels, save_panels
from benchmarks.research.methods import grid
from benchmarks.research.methods.grid import METHODS, WHOLE, Task
from benchmarks.research.methods.pictures import COLORS, plain_log
from benchmarks.research.methods.tables import lines
from benchmarks.research.paired.compare import Spot
from benchmarks.research.reporting.labels import label, short
from lorasb.utils.plotting import GRAD, INK, MUTED, SIGN

RELATIVES = {
    "rsLoRA": "#2a9d8f",
    "PiSSA": "#7a9e4b",
    "DoRA": "#8d6e63",
    "LoRA-GA": "#c9a227",
    "LoRA-Pro": "#6d597a",
    WHOLE: "#d8a47f",
}


def draw_scores(rows: Sequence[Row], tasks: Sequence[Task], path: Path) -> None:
    """Draw one panel per task and one line per method, with its trained parameters."""
    figure, axes = panels(-(-len(tasks) // 2), 2, (11, 3.4 * -(-len(tasks) // 2)))
    for one, task in zip(axes, tasks, strict=False):
        found = lines(rows, task.name)
        for i, line in enumerate(found):
            mean, deviation = line.score
            one.errorbar(mean, i, xerr=deviation, fmt="o", color=COLORS.get(line.method, MUTED), capsize=3, ms=5)
            one.plot(line.scores, [i] * len(line.scores), ".", color=INK, ms=2.5)
        one.set_yticks(range(len(found)), [f"{label(line)}  ({short(line.params)})" for line in found], fontsize=7.5)
        one.invert_yaxis()
        arrow = "right is better" if task.higher_is_better else "left is better"
        seeds = len(found[0].scores)
        one.set_xlabel(f"{task.metric} ({arrow})\nn = {task.test}, {seeds} seeds, mean ± sd", fontsize=8)
        one.set_title(task.name, fontsize=10)
    for one in axes[len(tasks) :]:
        one.set_visible(False)
    save_panels(figure, axes, path)


SERIES = {  # by entry: label, color, style, and a shift apart from marks of the same size; LoRA has an entry per rank
    "sign": ("LoRA-SB", SIGN, "o-", 1.0),
    "per-sample": ("LoRA-SB, per-sample", "#7fa6de", "o--", 1.12),
    "LoRA-XS": ("LoRA-XS", "#2a9d8f", "^-", 0.89),
    "LoRA": ("LoRA", GRAD, "s-", 1.0),
}


def draw_by_parameters(spots: Mapping[str, Sequence[Spot]], path: Path) -> None:
    """Draw one panel per task: loss over trained parameters."""
    figure, axes = panels(1, len(spots), (5.5 * len(spots), 4.2))
    for one, (task, found) in zip(axes, spots.items(), strict=True):
        draw_spots(one, found, 4, 7)
        one.set_xlabel("trained parameters", fontsize=8)
        one.set_ylabel("held-out loss (lower is better)", fontsize=8)
        one.set_title(task, fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    save_panels(figure, axes, path)


def draw_spots(axes: Any, spots: Sequence[Spot], size: float, font: float, ink: str = INK) -> None:
    """Draw methods with several ranks as lines, and the others as named marks."""
    for name, (text, color, style, shift) in SERIES.items():
        if line := sorted((spot for spot in spots if series_of(spot) == name), key=lambda spot: spot.trained):
            axes.plot([shift * s.trained for s in line], [s.loss for s in line], style[1:], color=color, lw=size / 4)
            axes.plot([], [], style, color=color, ms=size, lw=size / 4, label=text)
            for spot in line:
                _bar(axes, spot, shift * spot.trained, color, style[0], size)
    for spot in spots:
        if series_of(spot) is None:
            _bar(axes, spot, spot.trained, MUTED, "D", size)
    axes.set_xscale("log")
    plain_log(axes.yaxis)
    _name(axes, [spot for spot in spots if series_of(spot) is None], font, ink)


def _name(axes: Any, spots: Sequence[Spot], font: float, ink: str) -> None:
    """Name single marks; a name that would lie on another moves down."""
    axes.figure.canvas.draw()  # lays out the axes
    points, placed = 72 / axes.figure.dpi, list[tuple[float, float]]()
    for spot in sorted(spots, key=lambda spot: -spot.loss):
        x, mark = axes.transData.transform((spot.trained, spot.loss)) * points
        y = mark + 3
        for other, taken in placed:
            if abs(other - x) < 9 * font:
                y = min(y, taken - 1.2 * font)
        placed.append((x, y))
        at, offset = (spot.trained, spot.loss), (6, y - mark)
        axes.annotate(spot.name, at, xytext=offset, textcoords="offset points", fontsize=font, color=ink)


def _bar(axes: Any, spot: Spot, x: float, color: str, marker: str, size: float) -> None:
    """Draw a spot with an error bar over its seeds; hollow if fewer than three."""
    fill = color if len(spot.losses) > 2 else "none"
    low = min(spot.bar, 0.9 * spot.loss)  # the axis is logarithmic
    bars = {"ecolor": color, "capsize": size / 2, "elinewidth": size / 6}
    axes.errorbar(x, spot.loss, [[low], [spot.bar]], fmt=marker, color=color, ms=size, mfc=fill, **bars)


def series_of(spot: Spot) -> str | None:
    """Return the name of the line that a spot is on, or None."""
    name = "LoRA" if spot.name.startswith("LoRA r=") else spot.name
    return name if name in SERIES else None


def draw_rates(rows: Sequence[Row], tasks: Sequence[Task], path: Path) -> None:
    """Draw every method's sweep at its largest rank, with one legend below the panels, where it covers no line."""
    figure, axes = panels(-(-len(tasks) // 2), 2, (11, 3.0 * -(-len(tasks) // 2) + 0.4))
    legend: dict[str, Any] = {}
    for one, task in zip(axes, tasks, strict=False):
        legend |= _sweeps(one, rows, task)
        one.set_title(f"{task.name} (r={task.rank}; LoRA-XS and LoRA-SB r={task.ranks[-1]})", fontsize=10)
        plain_log(one.xaxis, (0.0, 2.6))  # "0.0005" is wide
        if not task.by_score:
            plain_log(one.yaxis)
        one.set_xlabel("peak learning rate (one seed)", fontsize=8)
        what = f"validation {task.metric}" if task.by_score else "validation loss (nats)"
        one.set_ylabel(f"{what}, n = {task.validation}", fontsize=7.5)
    for one in axes[len(tasks) :]:
        one.set_visible(False)
    names = [name for name in METHODS if name in legend]
    figure.legend(
        [legend[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )
    save_panels(figure, axes, path)


def _sweeps(one: Any, rows: Sequence[Row], task: Task) -> dict[str, Any]:
    """Draw one line per method, and return the lines by method name."""
    drawn = {}
    for method in METHODS.values():
        r = grid.ranks(task, method)[0]
        if found := grid.swept(task, method, r, rows, "score" if task.by_score else "loss"):
            rates = sorted(found)
            style = "-o" if method.name in COLORS else "--."
            color = COLORS.get(method.name) or RELATIVES.get(method.name)
            (drawn[method.name],) = one.plot(rates, [found[lr] for lr in rates], style, ms=4, color=color, lw=1.2)
    return drawn
