"""Readable names and sizes."""

from __future__ import annotations

from benchmarks.research.methods.tables import Line


def label(line: Line) -> str:
    """Return a method's name and rank."""
    return f"{line.method}, r={line.r}" if line.r else "full fine-tuning"


def short(parameters: int) -> str:
    """Format a number of parameters, such as 1.9M."""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.1f}k"
