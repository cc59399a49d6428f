"""A run's checkpoint folders: marking them complete, checking that they are, and removing old ones."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.atomic_files import sha256, write_json
from ..utils.reading import read_json

# Written last: a folder without it was interrupted while being written, and files of other contents are damaged.
MARK = "complete.json"
KEPT = 2  # the last one, and the one before in case the last gets damaged


@dataclass(frozen=True)
class Mark:
    """The content of complete.json, which marks a checkpoint as complete."""

    step: int
    seconds: float  # training time up to this step, over all starts
    identity: dict[str, Any]  # of the run, see `run_folder.identity_of`
    files: dict[str, str]  # name -> SHA-256


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for other folders."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and folder.is_dir() else -1


def complete(folder: Path, seconds: float, identity: dict[str, Any]) -> None:
    """Mark a checkpoint as complete, then remove complete checkpoints older than the last two."""
    write_json(folder / MARK, Mark(step_of(folder), seconds, identity, digests(folder)).__dict__)
    for old in sorted(whole(folder.parent), key=step_of)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def digests(folder: Path, except_for: str = MARK) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by name."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != except_for)
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def read(folder: Path) -> Mark | None:
    """A checkpoint's mark; None if the checkpoint is incomplete."""
    try:
        mark = Mark(**read_json(folder / MARK))
    except (OSError, ValueError, TypeError):
        return None
    numbers = isinstance(mark.step, int) and isinstance(mark.seconds, int | float)
    return mark if numbers and isinstance(mark.identity, dict) and isinstance(mark.files, dict) else None


def fault(folder: Path, files: dict[str, str]) -> str | None:
    """What is wrong with a folder that had files of these digests; None if it is as it was written."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"is incomplete ({name} is missing)"
        if sha256(file) != expected:
            return f"is damaged ({name} is not what was written)"
    return None


def whole(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder."""
    return [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and read(path) is not None]


def last(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last checkpoint that is as it was written (None if there is none), and what is wrong with later ones."""
    faults: dict[Path, str] = {}
    for path in sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True):
        mark = read(path)
        wrong = fault(path, mark.files) if mark else "was cut off while it was written"
        if wrong is None:
            return path, faults
        faults[path] = wrong
    return None, faults
