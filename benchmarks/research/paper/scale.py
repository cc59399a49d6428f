"""Theorem 5: W's updates do not depend on s if R's step is scaled as the theorem says.

LoRA-SB on CoLA's encoder in fp32, with the same batches and s = 0.1, 1 and 10. With SGD, losses coincide if the
gradient is divided by s². The length of AdamW's step does not depend on s, so there the learning rate is divided by s;
with the same rate for all, W's step scales with s.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import lorasb
from benchmarks.common.csv_files import write_csv
from benchmarks.common.figures import panels, save_panels
from benchmarks.common.tables import show
from benchmarks.common.timing import provenance_columns
from benchmarks.research.methods.grid import TASKS
from benchmarks.research.methods.problems import Batch, Problem, load
from lorasb.utils.plotting import GRAD, INK, SIGN

SCALES, STEPS, BATCH, R = (0.1, 1.0, 10.0), 40, 16, 16
COLORS = dict(zip(SCALES, (SIGN, INK, GRAD), strict=True))
RATES = {"SGD": 0.5, "AdamW": 4e-3}
# learning rates by s; for SGD, dividing the rate by s² is the same as dividing the gradient g
WAYS: dict[str, tuple[str, Callable[[float], float]]] = {
    "SGD, g / s²": ("SGD", lambda s: RATES["SGD"] / s**2),
    "AdamW, lr / s": ("AdamW", lambda s: RATES["AdamW"] / s),
    "AdamW, the same lr": ("AdamW", lambda s: RATES["AdamW"]),
}
Curves = dict[str, dict[float, list[float]]]


def train(problem: Problem, way: str, s: float, batches: list[Batch]) -> list[float]:
    """The loss of every step."""
    kind, rate = WAYS[way]
    model: Any = lorasb.patch(copy.deepcopy(problem.model), r=R, target_modules=problem.targets, scaling=s)
    lorasb.initialize(model, batches[:2], lr=1e-4, progress=False)
    cores = [p for name, p in model.named_parameters() if "lorasb_R" in name]
    optimizer = torch.optim.SGD(cores, rate(s)) if kind == "SGD" else torch.optim.AdamW(cores, rate(s), weight_decay=0)
    model.eval()  # no dropout
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def run(folder: Path | None) -> Curves:
    """All ways and scales over the same batches."""
    problem = load(TASKS["cola"], folder, torch.float32)
    batches = [problem.collate(problem.train[i * BATCH : (i + 1) * BATCH]) for i in range(STEPS)]
    return {way: {s: train(problem, way, s, batches) for s in SCALES} for way in WAYS}


def apart(curves: dict[float, list[float]]) -> float:
    """The largest difference between two scales' losses."""
    found = torch.tensor([curves[s] for s in SCALES], dtype=torch.float64)
    return float((found.max(0).values - found.min(0).values).max())


def lines(found: Curves) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    for way, curves in found.items():
        yield [way, *(f"{curves[s][-1]:.5f}" for s in SCALES), f"{apart(curves):.1e}"]


def plot(found: Curves, path: Path) -> None:
    """A panel a way."""
    figure, axes = panels(1, len(found), (11, 3.4), sharey=True)
    for one, (way, curves) in zip(axes, found.items(), strict=True):
        for s, width, style in zip(SCALES, (5, 3, 1.2), ("-", "-", "-"), strict=True):
            one.plot(
                range(1, STEPS + 1), curves[s], style, color=COLORS[s], linewidth=width, alpha=0.7, label=f"s = {s:g}"
            )
        one.set(title=f"{way}\nlargest difference {apart(curves):.1e}", xlabel="step")
        one.title.set_fontsize(10)
    axes[0].set_ylabel("training loss (nats)")
    axes[0].legend(frameon=False)
    save_panels(figure, axes, path, dpi=130, grid=False)


def main(output: Path, folder: Path | None) -> None:
    """Train, print, write and draw."""
    torch.manual_seed(0)
    found = run(folder)
    title = f"CoLA, r={R}, {STEPS} steps of {BATCH}, fp32: loss of the last step, by s"
    show(title, ("", *(f"s = {s:g}" for s in SCALES), "largest difference of any step"), lines(found))
    at = provenance_columns()
    steps = [
        {"way": way, "s": s, "step": i + 1, "loss": loss, **at}
        for way, curves in found.items()
        for s, losses in curves.items()
        for i, loss in enumerate(losses)
    ]
    write_csv(output / "scale.csv", steps, digits=9)
    plot(found, output / "scale.png")
