"""Table 7: what the initialization costs against an epoch of training.

The overhead is the setup time of LoRA-SB (patching, gradients, SVDs) minus that of LoRA-XS (patching, SVDs of W), from
the runs of `benchmarks.research.methods` at the largest r. It is compared with the run's training time and, if the
task has a data set, with an epoch. Times are minima over runs, because two run at a time and disturb each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import Row
from benchmarks.common.tables import show
from benchmarks.research.methods import rows, runner
from benchmarks.research.methods.grid import TASKS, Task
from lorasb.utils.plotting import GRAD, INK, canvas, save

EPOCHS = {"gsm8k": 7473, "cola": 8551}  # training examples of the data sets; the other tasks are generated
HEAD = (
    "task",
    "r",
    "LoRA-SB, s",
    "LoRA-XS, s",
    "training, s",
    "overhead / this run",
    "an epoch",
    "overhead / epoch",
)


def least(task: Task, method: str, there: Sequence[Row]) -> dict[str, float]:
    """Return a method's shortest setup and training times over all plain runs at the largest r."""
    found = [
        row
        for row in there
        if (row["task"], row["method"], row["r"], row["variant"]) == (task.name, method, str(task.ranks[-1]), "")
    ]
    names = {"init": "init_seconds", "train": "seconds"}
    return {key: min(float(row[name]) for row in found) for key, name in names.items()} if found else {}


def lines(there: Sequence[Row]) -> list[dict[str, Any]]:
    """A line a task."""
    found = []
    for task in TASKS.values():
        ours, theirs = (least(task, method, there) for method in ("LoRA-SB", "LoRA-XS"))
        if ours and theirs:
            found.append(_line(task, ours, theirs))
    return found


def _line(task: Task, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    overhead, epoch = ours["init"] - theirs["init"], EPOCHS.get(task.name)
    seconds = ours["train"] / (task.steps * task.batch) * epoch if epoch else None
    return {
        "task": task.name,
        "r": task.ranks[-1],
        "init_seconds": ours["init"],
        "init_seconds_lora_xs": theirs["init"],
        "train_seconds": ours["train"],
        "share_of_run": overhead / ours["train"],
        "epoch_samples": epoch,
        "epoch_seconds": seconds,
        "share_of_epoch": overhead / seconds if seconds else None,
    }


def shown(line: Mapping[str, Any]) -> list[str]:
    """For people, under `HEAD`."""
    return [
        line["task"],
        str(line["r"]),
        f"{line['init_seconds']:.1f}",
        f"{line['init_seconds_lora_xs']:.1f}",
        f"{line['train_seconds']:.0f}",
        f"{line['share_of_run']:.1%}",
        f"{line['epoch_samples']:,} examples, {line['epoch_seconds']:,.0f} s" if line["epoch_samples"] else "",
        f"{line['share_of_epoch']:.2%}" if line["epoch_samples"] else "",
    ]


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Share of an epoch of each data set, and the paper's."""
    figure, axes = canvas()
    known = [line for line in found if line["epoch_samples"]]
    names = [f"{line['task']}\n({line['epoch_samples']:,} examples)" for line in known]
    bars = axes.bar(names, [100 * line["share_of_epoch"] for line in known], color=GRAD, width=0.3)
    axes.bar_label(bars, [f"{line['share_of_epoch']:.2%}" for line in known], fontsize=9)
    axes.axhspan(1.1, 1.49, color=INK, alpha=0.15, label="the paper's Table 7 (1.10% to 1.49%)")
    axes.set_ylabel("overhead over LoRA-XS (% of an epoch)")
    axes.legend(frameon=False, fontsize=9, loc="center")
    save(figure, axes, "Cost of the initialization (Table 7)", path)


def render(there: Sequence[Row], output: Path) -> list[dict[str, Any]]:
    """Draw the picture; a line a task."""
    if found := lines(there):
        plot(found, output / "table-7.png")
    return found


def main(options: argparse.Namespace) -> None:
    """Draw and print."""
    if not (found := render(rows.read(options.output / runner.ROWS), options.output)):
        raise SystemExit("no task has both LoRA-SB and LoRA-XS yet: python -m benchmarks.research.methods first")
    show("Initialization against training (Table 7), on one core", HEAD, map(shown, found))
