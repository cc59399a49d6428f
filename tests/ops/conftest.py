"""The kernels that a test runs by, one after another."""

from __future__ import annotations

import pytest

import lorasb
from lorasb.backends import cpp
from lorasb.backends import eager as by_torch

KERNELS = ["eager", *cpp.instruction_sets()] if cpp.missing() is None else ["eager"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest):
    """Eager, then the C++ kernels of every instruction set that this processor has."""
    if request.param == "eager":
        with lorasb.backend("eager"):
            yield request.param
        return
    cpp.use_instruction_set(request.param)
    with lorasb.backend("cpp"):
        yield request.param
    cpp.use_instruction_set("")


@pytest.fixture(params=[True, False], ids=["composed", "function"])
def composed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways that calls on a CPU take: composed of torch's ops for small x, and a backward of our own."""
    monkeypatch.setattr(by_torch, "SMALL_BYTES", 2**40 if request.param else 0)
    return request.param
