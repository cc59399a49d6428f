"""Full fine-tuning, LoRA and its relatives, LoRA-XS and LoRA-SB on the same data, order and schedule.

    python -m benchmarks.methods [--task chain_sum ...] [--method LoRA-SB ...] [--data-dir DATA] [--minutes 50]
    python -m benchmarks.methods --table

Learning rates are swept on the validation split by one seed, then three seeds run at the best rate on the test split.
Runs go two at a time, one thread each, in processes of their own; rows go to benchmarks/results/methods.csv as they
finish, and what is there is not run again: stop and go on as you like. The grid takes about six hours of two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.methods import grid, pictures, rows, tables
from benchmarks.methods.grid import METHODS, TASKS, Cell

RESULTS = Path(__file__).parents[1] / "results"
ROWS, CURVES = "methods.csv", "methods-curves.jsonl"


def start(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", "benchmarks.methods.run", json.dumps(cell.described())]
    if options.data_dir:
        command += ["--data-dir", str(options.data_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{cell} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def todo(options: argparse.Namespace) -> list[Cell]:
    """What is missing: sweeps first, and the seeds of what has been swept."""
    there = rows.read(options.output / ROWS)
    if options.samples:
        return rows.missing(grid.samples(TASKS["chain_sum"]), there)
    cells: list[Cell] = []
    for name in options.task:
        for method in grid.order(options.method):
            wanted = [*grid.sweep(TASKS[name], method, there), *grid.finals(TASKS[name], method, there)]
            cells += rows.missing(wanted, there)
    return cells


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Run what is missing until nothing is, or the minutes are over; a run that fails is told and left out."""
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[dict[str, Any]], Cell] = {}
    failed: set[Cell] = set()
    with ThreadPoolExecutor(options.workers) as pool:
        while True:
            busy = set(running.values()) | failed
            ready = [cell for cell in todo(options) if cell not in busy]
            while ready and len(running) < options.workers and time.monotonic() < end:
                cell = ready.pop(0)
                running[pool.submit(start, cell, options)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    row = future.result()
                except RuntimeError as error:
                    failed.add(cell)
                    console.print(str(error), markup=False)
                    continue
                rows.append(options.output / ROWS, row)
                rows.append_curve(options.output / CURVES, row)
                console.print(f"{' '.join(cell.key)}: loss {row['loss']}, score {row['score']}, {row['seconds']} s")


def main() -> None:
    """Run the grid, or show what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--data-dir", type=Path, help="folder of cola.*.jsonl and gsm8k.*.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=600, help="start no run after so many")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--samples", action="store_true", help="only: samples of the initialisation, chain_sum, r=64")
    parser.add_argument("--picture", type=Path, help="draw what is there for chain_sum, and run nothing")
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    options = parser.parse_args()
    console = Console(width=120)
    if options.picture:
        pictures.choosing(rows.read(options.output / ROWS), "chain_sum", options.picture)
        return
    if not options.table:
        run_all(options, console)
    for table in tables.summary(rows.read(options.output / ROWS)):
        console.print(table)


if __name__ == "__main__":
    main()
