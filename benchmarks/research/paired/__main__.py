"""Starts of LoRA-SB in pairs of runs: eight seeds, a thousand held-out examples by loss, small ranks.

    python -m benchmarks.research.paired [--task chain_sum ...] [--entry sign ...] [--r 4 ...] [--seeds 8]
        [--data-dir DATA]
    python -m benchmarks.research.paired --table

For a seed, all entries of a task see the same batches in the same order. Rates are chosen on the validation split,
with a seed outside the comparison. Longer runs ("chain_sum, 300 steps"; only if named by --task) use the rates of the
short ones. Runs add their rows to results/paired.csv, and existing rows are not run again. --table ends with the number
of missing runs that --task, --entry, --r and --seeds select, without those that a sweep may add.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console

from benchmarks.common.csv_files import Row
from benchmarks.common.tables import show
from benchmarks.common.timing import use_dtype
from benchmarks.research.methods import rows, runner
from benchmarks.research.methods.grid import LONGER, Cell
from benchmarks.research.paired.compare import head, lines
from benchmarks.research.paired.grid import RANKS, ROWS, SEEDS, TASKS, entries, wanted


def counts(missing: Sequence[Cell]) -> Iterator[str]:
    """A line a task: how many runs are missing at each rank."""
    for task in dict.fromkeys(cell.task for cell in missing):
        at = Counter(cell.r for cell in missing if cell.task == task)
        parts = ", ".join(f"{count} at r={r}" for r, count in sorted(at.items()))
        yield f"{task}, missing runs: {parts}"


def main() -> None:
    """Run the grid, or show what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=(*TASKS, *LONGER), default=list(TASKS))
    parser.add_argument("--entry", nargs="+", choices=list(entries()), default=list(entries()))
    parser.add_argument("--r", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--other", choices=list(entries()), default="sign", help="what entries are compared with")
    runner.arguments(parser)
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    parser.set_defaults(rows=ROWS)
    options = parser.parse_args()
    use_dtype(options.dtype)
    console = Console(width=120)

    def selected(there: list[Row]) -> list[Cell]:
        return wanted(options.task, options.entry, options.r, SEEDS[: options.seeds], there)

    if not options.table:
        runner.run_all(selected, options, console)
    there = rows.read(options.output / ROWS)
    for task in (*TASKS, *LONGER):
        if body := list(lines(there, f"{task} by loss", options.other)):
            title = f"{task}: loss on held-out examples, and the difference from {options.other} (95% interval)"
            show(title, head(options.other), body, left=2, width=120)
    for line in counts(rows.missing(selected(there), there)):
        console.print(line)


if __name__ == "__main__":
    main()
