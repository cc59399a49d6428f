"""What a prepared launch keeps of its first call; test_launch_arguments.py and `--ptx` compare its arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasb.kernels import prepared_launch
from lorasb.kernels.block_sizes import PrepConfig
from lorasb.kernels.launcher import Launch
from lorasb.kernels.prepared_launch import NotPreparedError, Prepared, PreparedLaunch

Taken = list[dict[str, Any]]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def prepared(tensors: list[Tensor], **arguments: object) -> Prepared:
    """A launch with as much of a kernel as preparing asks for."""
    kernel = SimpleNamespace(params=[SimpleNamespace(name=name) for name in arguments], __name__="kernel")
    return Prepared([Launch(kernel, 1, arguments, PrepConfig(16, 16, 4, 1))], tensors)


@pytest.fixture
def known() -> Prepared:
    """Of x [4, 8], sums, counters and a seed, without dropout."""
    x, partial, counters = meta(4, 8), meta(100), meta(3, dtype=torch.int32)
    return prepared([x], x=x, partial=partial, counters=counters, seeds=(0,), DROPOUT=False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """The arguments of every launch by their names."""
    found: Taken = []

    def bind(launch: PreparedLaunch) -> Any:
        return lambda stream, values, tensors: found.append(
            dict(zip(launch.call.arguments, launch.take(values + launch.constants), strict=True))
        )

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0))
    monkeypatch.setattr(prepared_launch, "bind", bind)
    monkeypatch.setattr(prepared_launch, "driver", driver)
    return found


def test_without_dropout_a_seed_stays_the_number_that_was_compiled(known: Prepared, taken: Taken) -> None:
    known.repeat([torch.zeros(4, 8)], (2**62,))
    assert taken[0]["seeds"] == (0,)


def test_counters_are_allocated_once_a_kind(known: Prepared, taken: Taken) -> None:
    for _ in range(3):
        known.repeat([torch.zeros(4, 8)])
    assert len({one["counters"] for one in taken}) == 1


def test_tensors_that_are_less_aligned_launch_nothing(known: Prepared, taken: Taken) -> None:
    assert not known.repeat([torch.zeros(33)[1:].view(4, 8)])
    assert not taken


X, OTHER, THIRD = meta(4, 8), meta(4, 8), meta(4, 8)


@pytest.mark.parametrize(
    ("arguments", "tensors", "message"),
    [
        # what a launcher copied (rows that were not contiguous) would be missed by a repetition
        ({"x": X, "v": OTHER}, [X], "v of kernel is a copy"),
        ({"xs": (X, THIRD)}, [X, OTHER, THIRD], "stand together"),
    ],
    ids=["a copy", "tensors of one argument apart"],
)
def test_what_is_not_prepared(arguments: dict[str, Any], tensors: list[Tensor], message: str) -> None:
    with pytest.raises(NotPreparedError, match=message):
        prepared(tensors, **arguments, **dict.fromkeys(("partial", "counters"), meta(1)))
