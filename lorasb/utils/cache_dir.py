"""The folder of what lorasb keeps for a user: converted models, tables of tuned kernels."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LORASB_CACHE"


def cache_dir() -> Path:
    """$LORASB_CACHE, else ~/.cache/lorasb. Looked up at every call, so that a change of the variable is seen."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lorasb")
