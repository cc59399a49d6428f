"""The console of all commands (quiet on ranks other than 0), and one for errors on stderr."""

from __future__ import annotations

from rich.console import Console

console = Console(soft_wrap=False)
errors = Console(stderr=True)
