"""The calls whose kernels `static_report` compiles: shapes that compile to different kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A call of the library: the properties that lead to different kernels."""

    label: str
    M: int
    n: int
    ms: tuple[int, ...]
    r: int
    bias: bool = False
    dropout: float = 0.0


QKV = (4096, 1024, 1024)
VARIANTS = (
    Variant("default", 2048, 4096, (4096,), 96),
    Variant("group of 3", 2048, 4096, QKV, 96),
    Variant("group of 2", 2048, 4096, (14336, 14336), 96),
    Variant("r=256", 2048, 4096, (4096,), 256),
    Variant("few rows", 64, 4096, (4096,), 96),
    Variant("decode", 16, 4096, (4096,), 96),
    Variant("decode, group of 3", 16, 4096, QKV, 96),
    Variant("decode, group of 2, r=16", 16, 4096, (14336, 14336), 16),
    Variant("decode, r=256", 16, 4096, (4096,), 256),
    Variant("few rows, group of 2, r=128", 64, 4096, (14336, 14336), 128),
)
DROPOUT = Variant("dropout", 2048, 4096, (4096,), 96, dropout=0.05)
BF16_VARIANTS = (
    *VARIANTS,
    Variant("many rows", 8192, 4096, (4096,), 96),
    Variant("32 rows, r=64", 32, 4096, (4096,), 64),
    Variant("bias, r=16", 2048, 1024, (1024,), 16, bias=True),
    Variant("ragged", 2047, 4100, (4100,), 90),
    DROPOUT,
    Variant("dropout, group of 3", 2048, 4096, QKV, 96, dropout=0.05),
)
GRADIENTS = (
    Variant("gradient", 2048, 4096, (4096,), 96),
    Variant("gradient, odd tokens", 2047, 4096, (4096,), 96),
    Variant("gradient, narrow", 2048, 576, (576,), 96),
    Variant("gradient, ragged", 2047, 4100, (4100,), 96),
)

BATCH = 64
ROWS = (  # calls of BATCH rows, each with its own R
    Variant("rows, decode", 64, 4096, (4096,), 96),
    Variant("rows, 512 tokens", 64 * 512, 4096, (4096,), 96),
    Variant("rows, r=256", 64, 4096, (4096,), 256),
    Variant("rows, ragged", 64 * 70, 4100, (4100,), 90),
)

QUANTIZED = (
    Variant("4 bits, decode", 16, 4096, (4096,), 96),
    Variant("4 bits, 32 rows", 32, 4096, (4096,), 96),
    Variant("4 bits, 128 rows", 128, 4096, (4096,), 96),
    Variant("4 bits, scratch", 2048, 4096, (4096,), 96),
    Variant("4 bits, nested", 16, 4096, (14336,), 64, bias=True),
    Variant("4 bits, nested, scratch", 2048, 4100, (4100,), 90, bias=True),
)
