"""The README's picture: trained parameters, memory and score of LoRA-SB against LoRA, from the committed results.

python -m benchmarks.research.reporting.front [--output docs/why.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.figures import panels, save_panels
from benchmarks.research.methods import rows as methods_rows
from benchmarks.research.methods import runner
from benchmarks.research.reporting.markdown import read_json
from benchmarks.research.reporting.methods import lines
from lorasb.utils.plotting import INK, MUTED, SIGN

OUTPUT = runner.RESULTS.parents[1] / "docs" / "why.png"
LORA, OURS = "LoRA, r=32", "LoRA-SB, r=96"
SCORED = ("word_sequence_reversal", "chain_sum")


def draw(results: Path, path: Path) -> None:
    """Three panels, each with LoRA first."""
    step = read_json(results / "step-cpu.json")["ways"]
    ways = step["PEFT LoRA, r=32"], step["LoRA-SB, r=96"]
    figure, axes = panels(1, 3, (10, 2.6))
    _bars(axes[0], "trained parameters, millions", [way["trained"] / 1e6 for way in ways], ".1f")
    _bars(axes[1], "kept for backward in a step, MB", [way["kept_bytes"] / 1e6 for way in ways], ".0f")
    _scores(axes[2], results)
    save_panels(figure, axes, path, grid=False)


def _bars(axis: Any, title: str, values: list[float], form: str) -> None:
    axis.barh([LORA, OURS], values, color=[MUTED, SIGN])
    for i, value in enumerate(values):
        axis.text(value, i, f" {value:{form}}", va="center", fontsize=9, color=INK)
    axis.set_title(title, fontsize=10, color=INK)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(values))


def _scores(axis: Any, results: Path) -> None:
    """Exact answers of two tasks, mean and standard deviation over seeds."""
    rows = methods_rows.read(results / runner.ROWS)
    for i, task in enumerate(SCORED):
        found = {line.method: line for line in lines(rows, task)}  # the largest rank is the last
        for place, method, color in ((i - 0.18, "LoRA", MUTED), (i + 0.18, "LoRA-SB", SIGN)):
            scores = found[method].scores
            mean = sum(scores) / len(scores)
            spread = max(scores) - min(scores)
            axis.barh(place, mean, 0.32, color=color, xerr=spread / 2)
            axis.text(mean + spread / 2, place, f" {mean:.0%}", va="center", fontsize=9)
    axis.set_yticks(range(len(SCORED)), [task.replace("_", "\n", 1).replace("_", " ") for task in SCORED])
    axis.set_title("exact answers of two tasks", fontsize=10, color=INK)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=runner.RESULTS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    draw(options.results, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
