"""The cache folder of lorasb, for converted models and tables of tuned kernels."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "LORASB_CACHE"


def cache_dir() -> Path:
    """$LORASB_CACHE, or ~/.cache/lorasb if it is not set; read in every call."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lorasb")
