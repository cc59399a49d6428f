"""Names and sizes for people."""

from __future__ import annotations

from benchmarks.research.methods.tables import Line


def label(line: Line) -> str:
    """A method and its rank."""
    return f"{line.method}, r={line.r}" if line.r else "full fine-tuning"


def short(parameters: int) -> str:
    """For people."""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.1f}k"
