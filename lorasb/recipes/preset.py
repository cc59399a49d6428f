"""The paper's experiments as files of settings that come with the package: `lorasb finetune --preset NAME`."""

from __future__ import annotations

from pathlib import Path

from .config_file import nearest

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
        hint = nearest(name, known, f"known are {', '.join(known)}", cutoff=0.4)
        raise ValueError(f"--preset {name!r}: there is no such preset{hint}")
    return FOLDER / f"{name}.yaml"
