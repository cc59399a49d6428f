"""Python in a separate process, at the root of the repository if no other folder is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("LORASB_TRITONS")  # with a folder per version of Triton; `make test-all` makes it
TRITONS = sorted(path for path in Path(FOLDER).iterdir() if path.is_dir()) if FOLDER else []


def attempt(
    *arguments: object, given: str | None = None, cwd: Path = ROOT, program: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, whatever that is; `given` is its input, `variables` are set in its environment."""
    command, environment = [program, *map(str, arguments)], os.environ | variables
    return subprocess.run(command, cwd=cwd, env=environment, input=given, capture_output=True, text=True, timeout=500)


def python(*arguments: object, **options: Any) -> str:
    """What Python prints, run by `attempt`; it has to succeed."""
    done = attempt(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
