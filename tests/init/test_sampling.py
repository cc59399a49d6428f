"""Which samples are taken, and the first learning rate of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Batch
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler

from lorasb.init import first_step_lr
from lorasb.init.sampling import select


def test_by_default_32_samples_or_a_thousandth_are_taken() -> None:
    for available, wanted in ((5, 5), (40, 32), (32_001, 33)):
        loader = DataLoader([{"x": torch.zeros(1)}] * available, batch_size=16)
        samples = select(loader, None, seed=0)
        assert sum(1 for _ in samples) == -(-wanted // 16)
        assert samples.seen == wanted


def test_an_iterable_without_a_size_is_taken_whole_or_in_order() -> None:
    def stream() -> Iterator[Batch]:
        yield from ({"x": torch.full((3,), float(i))} for i in range(4))

    whole = select(stream(), None, seed=0)
    assert [float(batch["x"][0]) for batch in whole] == [0, 1, 2, 3]
    assert whole.seen == 12
    first = [batch["x"].tolist() for batch in select(stream(), 7, seed=0)]
    assert first == [[0.0] * 3, [1.0] * 3, [2.0]]


def test_empty_batches_are_passed_over() -> None:
    samples = select(iter([{"x": torch.zeros(n)} for n in (2, 0, 3)]), None, seed=0)
    assert [len(batch["x"]) for batch in samples] == [2, 3]
    assert samples.seen == 5


def test_a_loader_with_a_sampler_of_its_own_keeps_its_choice() -> None:
    data = [{"x": torch.tensor([i])} for i in range(100)]
    for sampler in (SubsetRandomSampler(range(20)), DistributedSampler(data, num_replicas=5, rank=1)):
        chosen = set(sampler)
        samples = select(DataLoader(data, batch_size=4, sampler=sampler), 16, seed=0)
        drawn = [int(value) for batch in samples for value in batch["x"]]
        assert len(drawn) == samples.seen == 16
        assert set(drawn) <= chosen


def test_a_loader_of_ready_batches_gives_as_many_samples_as_asked() -> None:
    samples = select(DataLoader([{"x": torch.zeros(3, 2)}] * 4, batch_size=None), 7, seed=0)
    assert sum(len(batch["x"]) for batch in samples) == 7


@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=5), share=st.floats(0.01, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_list_is_drawn_by_rows_without_repetition(rows: list[int], share: float, seed: int) -> None:
    total, start, batches = sum(rows), 0, []
    for count in rows:
        batches.append({"x": torch.arange(start, start + count)})
        start += count
    wanted = max(1, int(total * share))
    drawn = [value for batch in select(batches, wanted, seed) for value in batch["x"].tolist()]
    again = [value for batch in select(batches, wanted, seed) for value in batch["x"].tolist()]
    assert drawn == again
    assert len(drawn) == len(set(drawn)) == wanted


@pytest.mark.parametrize("kind", ["loader", "list", "stream"])
def test_too_few_samples_names_both_numbers(kind: str) -> None:
    data: dict[str, Callable[[], object]] = {
        "loader": lambda: DataLoader([{"x": torch.zeros(1)}] * 5, batch_size=2),
        "list": lambda: [{"x": torch.zeros(2)}, {"x": torch.zeros(3)}],
        "stream": lambda: iter([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}]),
    }
    with pytest.raises(ValueError, match="num_samples=9, but the batches hold 5 samples"):
        list(select(data[kind](), 9, seed=0))


@pytest.mark.parametrize("empty", [[], iter([])], ids=["list", "stream"])
def test_no_samples_are_refused(empty: object) -> None:
    with pytest.raises(ValueError, match="expected at least one sample to initialize from, got none"):
        list(select(empty, None, seed=0))


@pytest.mark.parametrize("bad", [{"x": 1}, "text", 3])
def test_what_is_no_batches_is_refused(bad: object) -> None:
    with pytest.raises(TypeError, match=r"expected batches \(a DataLoader|expected an iterable of batches"):
        select(bad, None, seed=0)


def test_batches_that_are_no_dicts_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected batches as dicts of tensors, got Tensor: give a collate_fn"):
        select([torch.zeros(3)], None, seed=0)


def test_ragged_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share their first dimension, got \[2, 3\]"):
        select([{"x": torch.zeros(2), "y": torch.zeros(3)}], None, seed=0)


def test_first_step_lr() -> None:
    assert first_step_lr(2e-3) == 2e-3
    assert first_step_lr(2e-3, 20) == pytest.approx(1e-4)
    assert first_step_lr(2e-3, 0.1, total_steps=200) == pytest.approx(1e-4)
    for arguments, message in (
        ((0.0,), "positive learning rate"),
        ((1e-3, -1), ">= 0"),
        ((1e-3, 0.1), "give total_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            first_step_lr(*arguments)


def test_the_published_code_counts_batches_of_the_estimation() -> None:
    """Mistral-7B on 50,000 examples: batches of 3 to estimate, steps of 32 to train."""
    batches, steps = 16_667, 1_563
    assert first_step_lr(1e-4, 0.02, total_steps=batches, rule="published") == pytest.approx(3.0e-7, rel=1e-3)
    assert first_step_lr(1e-4, 0.02, total_steps=steps) == pytest.approx(1e-4 / 32)
    assert first_step_lr(1e-4, 0.5, total_steps=1, rule="published") == 2e-4  # not rounded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e-4, 0.02, None), "give total_steps too"),
        ((1e-4, 20, 100), r"a share of the estimation's batches.*got 20 and 100"),
        ((1e-4, 0, 100), "a share of the estimation's batches"),
        ((1e-4, 0.02, 0), "a share of the estimation's batches"),
    ],
)
def test_the_published_rule_needs_a_share_and_batches(arguments: tuple[float, float, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_step_lr(*arguments, rule="published")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="expected rule to be one of schedule, published, got 'paper'"):
        first_step_lr(1e-4, rule="paper")
