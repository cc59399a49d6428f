"""Counters of arriving programs: those of the default stream are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasb.kernels import workspace

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device that there is not, whose tensors lie on the CPU."""
    default = object()
    state = SimpleNamespace(stream=default, capturing=False)

    def zeros(*size: Any, device: torch.device, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)

    streams = SimpleNamespace(
        is_current_stream_capturing=lambda: state.capturing,
        current_stream=lambda device: state.stream,
        default_stream=lambda device: default,
    )
    monkeypatch.setattr(workspace, "torch", SimpleNamespace(zeros=zeros, int32=torch.int32, cuda=streams))
    workspace.forget()
    yield state
    workspace.forget()


def test_the_default_streams_are_kept_and_grow(cuda: SimpleNamespace) -> None:
    first = workspace.counters(DEVICE, 10)
    assert workspace.counters(DEVICE, 4096).data_ptr() == first.data_ptr()
    assert workspace.counters(DEVICE, 5000).numel() >= 5000


@pytest.mark.parametrize("why", ["capturing", "another stream"])
def test_new_zeros_where_none_may_be_shared(cuda: SimpleNamespace, why: str) -> None:
    kept = workspace.counters(DEVICE, 10)
    cuda.capturing = why == "capturing"
    if not cuda.capturing:
        cuda.stream = object()
    found = [workspace.counters(DEVICE, 7) for _ in range(2)]
    assert [one.numel() for one in found] == [7, 7]
    assert not any(one.any() for one in found)
    assert len({one.data_ptr() for one in (kept, *found)}) == 3


def test_on_a_cpu_every_call_has_zeros_of_its_own() -> None:
    assert not workspace.counters(torch.device("cpu"), 3).any()
