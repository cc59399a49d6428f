"""Why an ordering of the paper does not show: what the ablations' numbers support."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.methods.grid import Task
from benchmarks.reporting.markdown import Row


def explanation(rows: Sequence[Row], task: Task) -> list[str]:
    """Paragraphs."""
    return ["No experiment explains it yet."]
