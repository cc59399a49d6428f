"""Tables of results on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1, width: int = 140) -> None:
    """Print a table whose first `left` columns are text and the others numbers."""
    table = Table(title=title)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=width).print(table)
