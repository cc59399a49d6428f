"""A run's checkpoint folders: marking them complete, checking that they are, and removing old ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_json

# Written last: a folder without it, or with files of other sizes than it lists, was interrupted while being written.
MARK = "complete.json"
KEPT = 2  # the last one, and the one before in case the last gets damaged


@dataclass(frozen=True)
class Mark:
    """The content of complete.json, which marks a checkpoint as complete."""

    step: int
    seconds: float  # training time up to this step, over all starts
    identity: dict[str, Any]  # of the run, see `run_folder.identity_of`
    files: dict[str, int]  # name -> bytes


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for other folders."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and folder.is_dir() else -1


def complete(folder: Path, seconds: float, identity: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, then remove complete checkpoints older than the last two."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    mark = Mark(step_of(folder), seconds, identity, {name: size for name, size in files.items() if name != MARK})
    write_json(folder / MARK, mark.__dict__)
    for old in sorted(whole(folder.parent), key=step_of)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Mark | None:
    """A checkpoint's mark; None if the checkpoint is incomplete."""
    try:
        mark = Mark(**json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    sizes = ((folder / name, size) for name, size in mark.files.items())
    return mark if all(file.is_file() and file.stat().st_size == size for file, size in sizes) else None


def whole(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder."""
    return [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and read(path) is not None]


def last(folder: Path) -> tuple[Path | None, list[Path]]:
    """The last complete checkpoint (None if there is none), and all incomplete ones."""
    folders = sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)
    best = max((path for path in folders if read(path) is not None), key=step_of, default=None)
    return best, [path for path in folders if read(path) is None]
