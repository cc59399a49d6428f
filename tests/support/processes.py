"""Python in a process of its own, at the root of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def attempt(*arguments: object, given: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, whatever that is; `given` is its input, `variables` are set in its environment."""
    command, environment = [sys.executable, *map(str, arguments)], os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environment, input=given, capture_output=True, text=True, timeout=500)


def python(*arguments: object, given: str | None = None, **variables: str) -> str:
    """What Python prints; it has to succeed."""
    done = attempt(*arguments, given=given, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
