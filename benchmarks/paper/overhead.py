"""Table 7: what the initialisation costs beside an epoch of training.

From the test runs of `benchmarks.methods`: seconds of putting LoRA-SB in (patching, gradients, SVDs) less those of
LoRA-XS (patching, SVDs of W), and seconds of a training step times the steps of an epoch, by task at the largest r.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.methods import rows, runner
from benchmarks.methods.grid import TASKS, Task
from lorasb.files import replacing
from lorasb.plotting import GRAD, INK, canvas, save

EPOCHS = {"chain_sum": 50_000, "word_sequence_reversal": 50_000, "gsm8k": 7473, "cola": 8551}  # samples of one
Row = dict[str, str]


def medians(task: Task, method: str, there: Sequence[Row]) -> dict[str, float]:
    """Of all runs of a method at the largest r: seconds to put it in, and of a training step."""
    found = [
        row for row in there
        if (row["task"], row["method"], row["r"], row["variant"]) == (task.name, method, str(task.ranks[-1]), "")
    ]  # fmt: skip
    if not found:
        return {}
    step = statistics.median(float(row["seconds"]) / int(row["steps"]) for row in found)
    return {"init": statistics.median(float(row["init_seconds"]) for row in found), "step": step, "runs": len(found)}


def lines(there: Sequence[Row]) -> list[dict[str, Any]]:
    """A line a task."""
    found = []
    for task in TASKS.values():
        ours, theirs = (medians(task, method, there) for method in ("LoRA-SB", "LoRA-XS"))
        if not ours or not theirs:
            continue
        epoch = ours["step"] * EPOCHS[task.name] / task.batch
        found.append({
            "task": task.name, "r": task.ranks[-1], "runs": int(ours["runs"]), "init_seconds": ours["init"],
            "init_seconds_lora_xs": theirs["init"], "overhead_seconds": ours["init"] - theirs["init"],
            "epoch_samples": EPOCHS[task.name], "epoch_seconds": epoch,
            "share": (ours["init"] - theirs["init"]) / epoch,
        })  # fmt: skip
    return found


def view(found: Sequence[Mapping[str, Any]]) -> Table:
    """For people."""
    table = Table(
        title="Initialisation beside an epoch (Table 7), medians over runs, one core; epochs from seconds a step"
    )
    for name in ("", "r", "runs", "LoRA-SB", "LoRA-XS", "overhead", "epoch", "overhead / epoch"):
        table.add_column(name, justify="right" if name else "left")
    for line in found:
        table.add_row(
            line["task"], str(line["r"]), str(line["runs"]), f"{line['init_seconds']:.1f} s",
            f"{line['init_seconds_lora_xs']:.1f} s", f"{line['overhead_seconds']:.1f} s",
            f"{line['epoch_samples']:,} samples, {line['epoch_seconds']:.0f} s", f"{line['share']:.2%}",
        )  # fmt: skip
    return table


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Share of an epoch, by task, and the paper's."""
    figure, axes = canvas()
    names = [f"{line['task']}\n(n = {line['runs']} runs)" for line in found]
    bars = axes.bar(names, [100 * line["share"] for line in found], color=GRAD, width=0.5)
    axes.bar_label(bars, [f"{line['overhead_seconds']:.1f} s" for line in found], fontsize=9)
    axes.axhspan(1.1, 1.3, color=INK, alpha=0.15, label="the paper's 7B and 9B models (1.1% to 1.3%)")
    axes.set_ylabel("overhead over LoRA-XS (% of an epoch)")
    axes.legend(frameon=False, fontsize=9)
    save(figure, axes, "Cost of the initialisation (Table 7)", path)


def main(options: argparse.Namespace) -> None:
    """Print, write and draw."""
    if not (found := lines(rows.read(options.output / runner.ROWS))):
        raise SystemExit("no task has both LoRA-SB and LoRA-XS yet: python -m benchmarks.methods first")
    Console(width=150).print(view(found))
    with (
        replacing(options.output / "table-7.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()} for line in found)
    plot(found, options.output / "table-7.png")
