"""One linear: bare, the eager chain, PEFT's LoRA, ours. On a GPU the models' shapes; on a CPU smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.common.shapes import MODELS
from benchmarks.common.timing import measured_dtype
from benchmarks.layers.conftest import device
from benchmarks.layers.variants import Problem

CPU_SHAPES = ((576, 1536), (1024, 1024), (1024, 4096), (4096, 4096))


def cases() -> Iterator[tuple[int, int, int, int, torch.dtype]]:
    """n, m, M, r, dtype."""
    if device() == "cpu":
        for n, m in CPU_SHAPES:
            for dtype in dict.fromkeys((torch.float32, measured_dtype())):
                for M in (1, 16, 512):
                    yield from ((n, m, M, r, dtype) for r in ((32, 64, 96) if M == 512 else (96,)))
        return
    shapes = {(group.n, m) for groups in MODELS.values() for group in groups for m in group.ms}
    for n, m in sorted(shapes):
        for M in (1, 16, 512, 2048, 8192):
            yield from ((n, m, M, r, measured_dtype("cuda")) for r in (32, 64, 96))


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("n", "m", "M", "r", "dtype"), list(cases()))
def test_layer(compare: Callable, n: int, m: int, M: int, r: int, dtype: torch.dtype, direction: str) -> None:
    """y = x Wᵀ + x Aᵀ Rᵀ Bᵀ for one W [m, n]."""
    compare(Problem(n, (m,), r, M, dtype, device()), direction)
