"""A run's checkpoints: which are whole, whose they are, and which are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_json

MARK = "complete.json"  # written last: a folder without it, or whose files are not as it says, was cut off
KEPT = 2


@dataclass(frozen=True)
class Mark:
    """What is written once a checkpoint is whole."""

    step: int
    seconds: float  # of training until then
    identity: dict[str, Any]
    files: dict[str, int]  # name -> bytes


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 for other folders."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and folder.is_dir() else -1


def complete(folder: Path, seconds: float, identity: dict[str, Any]) -> None:
    """Say that a checkpoint is whole, and remove all before it but the one before."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    mark = Mark(step_of(folder), seconds, identity, {name: size for name, size in files.items() if name != MARK})
    write_json(folder / MARK, mark.__dict__)
    for old in sorted(whole(folder.parent), key=step_of)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Mark | None:
    """A checkpoint's mark; None where the checkpoint was cut off while it was written."""
    try:
        mark = Mark(**json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    sizes = ((folder / name, size) for name, size in mark.files.items())
    return mark if all(file.is_file() and file.stat().st_size == size for file, size in sizes) else None


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder."""
    return [one for one in folder.glob("checkpoint-*") if step_of(one) >= 0 and read(one) is not None]


def last(folder: Path) -> tuple[Path | None, list[Path]]:
    """The last whole checkpoint, and those after it that were cut off."""
    found = sorted((one for one in folder.glob("checkpoint-*") if step_of(one) >= 0), key=step_of)
    best = max((one for one in found if read(one) is not None), key=step_of, default=None)
    return best, [one for one in found if read(one) is None]
