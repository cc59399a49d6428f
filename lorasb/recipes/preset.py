"""The paper's experiments as files of settings that come with the package: `lorasb finetune --preset NAME`."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).with_name("presets")


def names() -> list[str]:
    """The presets, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """A preset's file.

    Raises:
        ValueError: there is none of this name; the message has the nearest.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"--preset {name!r}: there is no such preset: {hint}")
    return FOLDER / f"{name}.yaml"
