"""One console for all commands, and errors a user can act on."""

from __future__ import annotations

from rich.console import Console

console = Console(soft_wrap=False)
errors = Console(stderr=True)
