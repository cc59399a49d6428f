"""Counters of arriving programs: one set a stream, allocated on the default stream alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasb.kernels import workspace

DEVICE = torch.device("cuda", 0)


@dataclass(eq=False)
class Stream:
    """As much of a CUDA stream as is looked at."""

    cuda_stream: int
    waited: list[int] = field(default_factory=list)

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.cuda_stream)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device that there is not, whose tensors lie on the CPU."""
    default = Stream(0)
    state = SimpleNamespace(stream=default, capturing=False, made=[])

    def zeros(*size: Any, device: torch.device, **options: Any) -> torch.Tensor:
        state.made.append(state.stream.cuda_stream)
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
    assert len(cuda.made) == 3  # its own twice, and those of other streams once


def test_each_stream_has_its_own_without_an_allocation(cuda: SimpleNamespace) -> None:
    own = workspace.counters(DEVICE, 10)
    made, pointers = len(cuda.made), {own.data_ptr()}
    for number in range(1, workspace.SIDE_STREAMS + 1):
        cuda.stream = Stream(number)
        found = workspace.counters(DEVICE, 100)
        assert cuda.stream.waited == [0]  # they were zeroed there
        assert workspace.counters(DEVICE, 100).data_ptr() == found.data_ptr()
        assert cuda.stream.waited == [0]
        pointers.add(found.data_ptr())
    assert len(cuda.made) == made
    assert len(pointers) == workspace.SIDE_STREAMS + 1
    cuda.stream = Stream(99)  # one too many
    assert workspace.counters(DEVICE, 100).data_ptr() not in pointers
    assert len(cuda.made) == made + 1


@pytest.mark.parametrize("why", ["capturing", "before the default stream", "too many counters"])
def test_fresh_zeros_where_none_may_be_shared(cuda: SimpleNamespace, why: str) -> None:
    if why != "before the default stream":
        workspace.counters(DEVICE, 10)
    cuda.stream, cuda.capturing = Stream(5), why == "capturing"
    count = workspace.SIDE_COUNTERS + 1 if why == "too many counters" else 7
    found = [workspace.counters(DEVICE, count) for _ in range(2)]
    assert [one.numel() for one in found] == [count, count]
    assert not any(one.any() for one in found)
    assert found[0].data_ptr() != found[1].data_ptr()


def test_on_a_cpu_every_call_has_zeros_of_its_own() -> None:
    assert not workspace.counters(torch.device("cpu"), 3).any()
