"""Markdown from rows: tables, pictures, and where and when something was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import Row


def table(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table whose first `left` columns are text and the others numbers."""
    marks = ["---" if i < left else "---:" for i in range(len(head))]
    return [f"| {' | '.join(line)} |" for line in (head, marks, *body)]


def picture(title: str, name: str, folder: str = "research/results") -> list[str]:
    """Return a picture in a folder of benchmarks/, with empty lines around it."""
    return ["", f"![{title}]({folder}/{name})", ""]


def committed_picture(title: str, folder: Path, name: str) -> list[str]:
    """Return a committed picture that the report does not draw itself; nothing if the folder lacks it."""
    return picture(title, name, "results") if (folder / name).is_file() else []


def read_json(path: Path) -> dict[str, Any]:
    """Read a results file; return an empty dictionary if it does not exist."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def where(found: Mapping[str, Any]) -> str:
    """Return machine, versions, commit and date of a results file."""
    machine = found["machine"]
    at = f"commit {found['commit']}" if "commit" in found else "commit not recorded"
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    kind = f" ({machine['class']})" if "class" in machine else ""  # older results lack it and the dtype
    dtype = f", {machine['dtype']}" if "dtype" in machine else ""
    place = f"{machine['cpu']}{kind}{dtype}, {threads}, torch {machine['torch']}, peft {machine['peft']}"
    return f"*{place}; {at}, {found.get('date', 'date not recorded')}.*"


def where_rows(rows: Sequence[Row], letters: Mapping[str, str] | None = None) -> str:
    """Return the same for rows measured over some time; machines have the letters that a table uses for them."""
    if not rows:
        return "*no row*"
    versions = sorted({row["version"] for row in rows})
    machines = sorted({row["machine"] for row in rows})
    named = ", ".join(machines) if letters is None else "; ".join(f"{letters[name]}: {name}" for name in machines)
    dates = sorted({row["date"] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"*{named}, one thread per run, two runs at a time; commits {', '.join(versions)}; {span}.*"
