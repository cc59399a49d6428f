"""The kernels that the ops are tested with: those of all tests, and a naive table of products."""

from collections.abc import Iterator
from functools import partial

import pytest
from measuring import SETS, kernels
from naive_backend import NAIVE

from lorasb.backends import eager
from lorasb.ops import registry


@pytest.fixture(params=["eager", "naive", *SETS])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Eager torch, a naive table of products, and the C++ kernels of every instruction set that this processor has."""
    if request.param == "naive":
        naive = (partial(call, NAIVE) for call in (eager.forward, eager.backward))
        found = registry.direct_kernels["eager", "cpu"]
        monkeypatch.setitem(registry.direct_kernels, ("eager", "cpu"), registry.Kernels(*naive, found.backward_op))
    with kernels(request.param) as name:
        yield name
