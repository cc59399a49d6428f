"""Which path and which blocks: rules from JSON tables, a user's first, then the shipped ones, then a safe default.

A rule holds where all its conditions do: `op` and `dtype` by name, `M`, `n`, `m`, `r` and `sms` by range [low, high].
The first that holds is taken. Nothing is timed here: `lorasb bench tune` writes a user's table, once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .configs import DECODE_ROWS, GemmConfig, PrepConfig

TABLES = Path(__file__).parent / "tables"
PATHS = ("fused", "addmm")
CACHE_VARIABLE = "LORASB_CACHE"


@dataclass(frozen=True)
class Shape:
    """One product: M tokens, n in, m out (of a group: the sum), rank r."""

    op: str
    dtype: str
    M: int
    n: int
    m: int
    r: int


@dataclass(frozen=True)
class Plan:
    """`fused`: prep and the extended GEMM; `addmm`: prep, then cuBLAS twice, the second onto the first."""

    path: str
    prep: PrepConfig
    gemm: GemmConfig


def default_prep(shape: Shape) -> PrepConfig:
    """Blocks that fit every GPU since sm_80."""
    if shape.M <= DECODE_ROWS:
        return PrepConfig(16, 64, 4, 3)
    return PrepConfig(32, 32, 4, 2) if shape.dtype == "fp32" or shape.r > 128 else PrepConfig(32, 64, 4, 3)


def default_gemm(shape: Shape) -> GemmConfig:
    """Blocks that fit every GPU since sm_80."""
    if shape.M <= DECODE_ROWS:
        return GemmConfig(16, 64, 64, 1, 4, 3)
    if shape.dtype == "fp32":
        return GemmConfig(64, 64, 16, 8, 8, 3)
    return GemmConfig(128, 128, 32, 8, 8, 4) if shape.M > 64 else GemmConfig(64, 128, 32, 8, 4, 4)
