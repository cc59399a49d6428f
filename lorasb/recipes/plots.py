"""The plot of a run's training and held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.plotting import GRAD, INK, MUTED, SIGN, canvas, save

SMOOTHING = 0.75  # weight of the past in the moving average, about four steps


def plot_loss(history: list[dict[str, Any]], before: float, after: float, path: Path, title: str) -> None:
    """Plot the training loss by step, raw and smoothed, and the held-out loss before and after, into a PNG."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = canvas()
    steps, losses = zip(*points, strict=True) if points else ((0,), (before,))
    axes.plot(steps, losses, color=MUTED, linewidth=0.8, alpha=0.7, label="training loss, by step")
    axes.plot(steps, smoothed(losses), color=SIGN, linewidth=2, label="training loss, smoothed")
    last = max(steps)
    axes.plot([0, last], [before, after], "o", color=GRAD, markersize=8, zorder=5, label="held-out loss")
    for x, y, side in ((0, before, "left"), (last, after, "right")):
        offset = (10, 0) if side == "left" else (-6, 12)
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=offset, ha=side, color=INK)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    save(figure, axes, title, path)


def smoothed(losses: tuple[float, ...]) -> list[float]:
    """Exponential moving average with bias correction, as Adam's: divided by the sum of weights so far."""
    average, weight, averages = 0.0, 0.0, []
    for loss in losses:
        average, weight = SMOOTHING * average + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        averages.append(average / weight)
    return averages
