"""A prepared launch hands every argument of its kernel the address, the seed or the number that belongs there."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ptx.plugin import arguments_of
from torch import Tensor

from lorasb.kernels import prepared_launch
from lorasb.kernels.block_sizes import PrepConfig
from lorasb.kernels.launcher import Launch
from lorasb.kernels.prepared_launch import NotPreparedError, Prepared, PreparedLaunch

CONFIG = PrepConfig(16, 16, 4, 1)
NAMES = ("x", "factors", "v", "M", "partial", "counters", "seeds", "dcores", "DROPOUT")


def kernel(*names: str) -> Any:
    """As much of a kernel as preparing asks for."""
    return SimpleNamespace(params=[SimpleNamespace(name=name) for name in names], __name__="kernel")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every launch."""
    found: list[tuple[Any, ...]] = []

    def bind(launch: PreparedLaunch) -> Any:
        def raw(stream: int, values: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
            found.append(launch.take(values + launch.constants))

        return raw

    monkeypatch.setattr(prepared_launch, "bind", bind)
    monkeypatch.setattr(
        prepared_launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0))
    )
    return found


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def prepared(split: bool, dropout: bool = True) -> Prepared:
    """A kernel of x [4, 8], two factors, the second half of v [8, 16], sums, counters, a seed and numbers."""
    x, factors, v = meta(4, 8), [meta(8, 8), meta(8, 8)], meta(8, 16)
    partial = meta(100 if split else 1)
    counters = meta(3, dtype=torch.int32) if split else partial.view(torch.int32)
    values = (x, tuple(factors), v[4:], 4, partial, counters, (0,), (partial,), dropout)
    call = Launch(kernel(*NAMES), 2, dict(zip(NAMES, values, strict=True)), CONFIG)
    return Prepared([call], [x, *factors], inner=[v])


@pytest.mark.parametrize("split", [True, False])
def test_every_argument_gets_what_is_its(split: bool, taken: list[tuple[Any, ...]]) -> None:
    known = prepared(split)
    for seeds in ((5,), (2**62 + 1,)):  # once more, with other tensors
        tensors = zeros()
        given = list(tensors)
        assert known.repeat(given, seeds)
        x, factors, v, M, partial, counters, told, dcores, _ = taken.pop()
        addresses = [tensor.data_ptr() for tensor in tensors]
        assert (x, list(factors), M, told) == (addresses[0], addresses[1:], 4, seeds)
        scratch = given[3]
        assert v == scratch.data_ptr() + 4 * 16 * 4
        if split:
            assert partial == dcores[0] == scratch.data_ptr() + 8 * 16 * 4
            assert scratch.numel() == 8 * 16 + 100
            assert counters == given[4].data_ptr()
            assert given[4].dtype == torch.int32
            assert not given[4].any()
            assert given[4].numel() == 3
        else:  # dummies, which no program touches
            assert {partial, counters, *dcores} == {addresses[0]}


def zeros() -> list[Tensor]:
    return [torch.zeros(4, 8), torch.zeros(8, 8), torch.zeros(8, 8)]


def test_without_dropout_a_seed_stays_the_number_that_was_compiled(taken: list[tuple[Any, ...]]) -> None:
    prepared(False, dropout=False).repeat(zeros(), (2**62,))
    assert taken[0][NAMES.index("seeds")] == (0,)


def test_counters_are_allocated_once_a_kind(taken: list[tuple[Any, ...]]) -> None:
    known, pointers = prepared(True), set()
    for _ in range(3):
        known.repeat(zeros())
        pointers.add(taken[-1][NAMES.index("counters")])
    assert len(pointers) == 1


def test_tensors_that_are_less_aligned_launch_nothing(taken: list[tuple[Any, ...]]) -> None:
    shifted = torch.zeros(33)[1:].view(4, 8)
    assert not prepared(False).repeat([shifted, *zeros()[1:]])
    assert not taken


def test_arguments_by_name_are_views_of_the_tensors(taken: list[tuple[Any, ...]]) -> None:
    known = prepared(True)
    tensors = [torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8)]
    known.repeat(tensors, (7,))
    found = arguments_of(known.launches[0], tensors, (7,))
    assert torch.equal(found["x"], tensors[0])
    assert torch.equal(found["factors"][1], tensors[2])
    assert found["v"].shape == (4, 16)
    assert found["v"].untyped_storage().data_ptr() == tensors[3].untyped_storage().data_ptr()
    assert found["seeds"] == (7,)


X, OTHER, THIRD, DUMMY = meta(4, 8), meta(4, 8), meta(4, 8), meta(1)


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
    arguments |= {"partial": DUMMY, "counters": DUMMY}
    call = Launch(kernel(*arguments), 1, arguments, CONFIG)
    with pytest.raises(NotPreparedError, match=message):
        Prepared([call], tensors)
