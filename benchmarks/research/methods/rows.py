"""Rows of results in a CSV file, one a run, written as runs finish."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research.methods.grid import KEY, Cell

COLUMNS = (
    "task",
    "split",
    "metric",
    "higher_is_better",
    "method",
    "r",
    "lr",
    "seed",
    "variant",
    "score",
    "loss",
    "loss_before",
    "adapter_params",
    "init_seconds",
    "seconds",
    "peak_rss_mb",
    "steps",
    "energy",
    "energy_grad",
    "version",
    "machine",
    "date",
    "found_lr",  # measured or by trials, where a run finds its own rate
)


def key(row: Row) -> tuple[str, ...]:
    """Return what identifies a run, like `Cell.key`."""
    return tuple(row[name] for name in KEY)


def read(path: Path) -> list[dict[str, str]]:
    """All rows, the first of each run; none where there is no file yet."""
    found = read_csv(path)
    return list({key(row): row for row in reversed(found)}.values())[::-1]  # the first of each


def missing(cells: Iterable[Cell], rows: list[dict[str, str]]) -> list[Cell]:
    """The cells without a row, each once."""
    there = {key(row) for row in rows}
    return [cell for cell in dict.fromkeys(cells) if cell.key not in there]


def append(path: Path, row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Append a row in a single write: safe with several processes, and an interrupted run leaves complete rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    with path.open("a", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, io.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue())


def append_curve(path: Path, row: dict[str, Any], points: int = 50) -> None:
    """Append a run's training loss as a line of JSON; each point is a mean over the same number of steps."""
    losses = row["losses"]
    size = max(1, -(-len(losses) // points))
    curve = [round(sum(part) / len(part), 5) for part in (losses[i : i + size] for i in range(0, len(losses), size))]
    line = {name: row[name] for name in KEY} | {"steps_a_point": size, "losses": curve}
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")
