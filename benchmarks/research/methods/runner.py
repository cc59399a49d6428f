"""Runs cells side by side, each in its own process, and writes their rows as they finish."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.timing import dtype_option
from benchmarks.research.methods import rows
from benchmarks.research.methods.grid import KEY, Cell

BENCHMARKS = Path(__file__).parents[2]
RESULTS = BENCHMARKS / "research" / "results"
ROWS, CURVES = "methods.csv", "methods-curves.jsonl"
Wanted = Callable[[list[dict[str, str]]], Sequence[Cell]]  # existing rows -> the cells that should have rows


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs cells."""
    parser.add_argument("--data-dir", type=Path, help="folder of cola.*.jsonl and gsm8k.*.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.set_defaults(rows=ROWS)
    parser.add_argument("--minutes", type=float, default=600, help="start no run after this many minutes")
    parser.add_argument("--workers", type=int, default=2)
    dtype_option(parser)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")


def start(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Run a cell in its own process, and return its row.

    Raises:
        RuntimeError: it failed; the message ends with its stderr.
    """
    command = [sys.executable, "-m", "benchmarks.research.methods.run", json.dumps(cell.described())]
    if options.data_dir:
        command += ["--data-dir", str(options.data_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{cell} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_all(wanted: Wanted, options: argparse.Namespace, console: Console) -> None:
    """Run missing cells until none is left or the minutes are over; report a run that fails, and skip it."""
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[dict[str, Any]], Cell] = {}
    failed: set[Cell] = set()
    with ThreadPoolExecutor(options.workers) as pool:
        while True:
            ready = _ready(wanted, options.output / options.rows, set(running.values()) | failed)
            while ready and len(running) < options.workers and time.monotonic() < end:
                cell = ready.pop(0)
                running[pool.submit(start, cell, options)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    keep(future.result(), options.output / options.rows, console)
                except RuntimeError as error:
                    failed.add(cell)
                    console.print(str(error), markup=False)


def _ready(wanted: Wanted, path: Path, busy: set[Cell]) -> list[Cell]:
    """Return the cells that a file of rows lacks and that are not busy."""
    there = rows.read(path)
    return [cell for cell in rows.missing(wanted(there), there) if cell not in busy]


def keep(row: dict[str, Any], path: Path, console: Console) -> None:
    """Write what a run found."""
    rows.append(path, row)
    if path.name == ROWS:
        rows.append_curve(path.parent / CURVES, row)
    name = " ".join(str(row[key]) for key in KEY)
    console.print(f"{name}: loss {row['loss']}, score {row['score']}, {row['seconds']} s")
