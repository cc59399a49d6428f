"""Sizes in bytes, from numbers or text."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: float | str | None) -> float | None:
    """Bytes: 6e9, "6GB", "512 MiB".

    Raises:
        ValueError: no size, or none that is positive.
    """
    if size is None:
        return None
    if isinstance(size, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size)
        if found is None or found[2].upper() not in UNITS:
            raise ValueError(f"expected a size like '6GB' or a number of bytes, got {size!r}")
        size = float(found[1]) * UNITS[found[2].upper()]
    if not size > 0:
        raise ValueError(f"expected a positive number of bytes, got {size!r}")
    return float(size)
