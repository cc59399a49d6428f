"""CSV files of results, written atomically."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasb.utils.atomic_files import write_text

Row = dict[str, str]


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]], digits: int = 5) -> None:
    """Write lines that share their keys; floats are rounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, digits) if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """Rows; none where the file is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
