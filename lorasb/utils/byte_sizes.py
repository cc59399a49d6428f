"""Parsing of sizes in bytes."""

from __future__ import annotations

import re

# Bytes per unit, by its upper-case name: decimal and binary prefixes.
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: float | str | None) -> float | None:
    """The number of bytes in a size like 6e9, "6GB" or "512 MiB"; None for None.

    Raises:
        ValueError: the text is not a size, or the size is not positive.
    """
    if size is None:
        return None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in UNITS:
            raise ValueError(f"expected a size like '6GB' or a number of bytes, got {size!r}")
        size = float(match[1]) * UNITS[match[2].upper()]
    if not size > 0:  # true for NaN as well
        raise ValueError(f"expected a positive number of bytes, got {size!r}")
    return float(size)
