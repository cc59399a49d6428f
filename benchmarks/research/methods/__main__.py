"""Full fine-tuning, LoRA and its relatives, LoRA-XS and LoRA-SB on the same data, order and schedule.

    python -m benchmarks.research.methods [--task cola ...] [--method LoRA-SB ...] [--r 24 ...]
        [--data-dir DATA] [--minutes 50]
    python -m benchmarks.research.methods --table

Learning rates are swept on the validation split with one seed, then three seeds run at the best rate on the test split.
Two runs at a time execute in separate single-threaded processes. Each adds a row to results/methods.csv when it
finishes, and existing rows are not run again: stop and resume at any time. The grid takes some ten hours on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from benchmarks.common.timing import use_dtype
from benchmarks.research.methods import grid, rows, runner, tables
from benchmarks.research.methods.grid import METHODS, TASKS, Cell


def wanted(
    names: Sequence[str], methods: Sequence[str], there: list[dict[str, str]], ranks: Sequence[int]
) -> list[Cell]:
    """Return the next runs: sweeps, and the seeds of finished sweeps; only at `ranks`, if any are given."""
    cells: list[Cell] = []
    for name in names:
        for method in grid.order(methods):
            cells += [*grid.sweep(TASKS[name], method, there), *grid.finals(TASKS[name], method, there)]
    return [cell for cell in cells if not ranks or cell.r in ranks]


def main() -> None:
    """Run the grid, or show what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--r", nargs="+", type=int, default=[], help="these ranks only; full fine-tuning's is 0")
    runner.arguments(parser)
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    options = parser.parse_args()
    use_dtype(options.dtype)
    if not options.table:
        runner.run_all(
            lambda there: wanted(options.task, options.method, there, options.r), options, Console(width=120)
        )
    tables.show_all(rows.read(options.output / runner.ROWS))


if __name__ == "__main__":
    main()
