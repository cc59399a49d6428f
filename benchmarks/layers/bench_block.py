"""The gain from grouping: linears that read the same x, one by one and in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.common.shapes import MODELS
from benchmarks.common.timing import measured_dtype
from benchmarks.layers.conftest import device
from benchmarks.layers.variants import Problem

CPU_GROUPS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (576, (576, 192, 192)),
    (576, (1536, 1536)),
    (1024, (1024, 1024, 1024)),
)


def cases() -> Iterator[tuple[int, tuple[int, ...], int, int, torch.dtype]]:
    """n, the m of every member, M, r, dtype."""
    if device() == "cpu":
        for n, ms in CPU_GROUPS:
            yield from (
                (n, ms, M, 96, dtype) for M in (16, 512) for dtype in dict.fromkeys((torch.float32, measured_dtype()))
            )
        return
    groups = {(group.n, group.ms) for groups in MODELS.values() for group in groups if len(group.ms) > 1}
    for n, ms in sorted(groups):
        yield from ((n, ms, M, r, measured_dtype("cuda")) for M in (1, 16, 512, 2048, 8192) for r in (32, 64, 96))


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("n", "ms", "M", "r", "dtype"), list(cases()))
def test_group(
    compare: Callable, n: int, ms: tuple[int, ...], M: int, r: int, dtype: torch.dtype, direction: str
) -> None:
    """q/k/v or gate/up."""
    compare(Problem(n, ms, r, M, dtype, device()), direction)
