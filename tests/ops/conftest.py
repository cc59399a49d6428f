"""Both ways of small calls, one after another."""

from __future__ import annotations

import pytest

from lorasb.backends import eager as by_torch


@pytest.fixture(params=[True, False], ids=["composed", "function"])
def composed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways that calls on a CPU take: composed of torch's ops for small x, and a backward of our own."""
    monkeypatch.setattr(by_torch, "SMALL_BYTES", 2**40 if request.param else 0)
    return request.param
