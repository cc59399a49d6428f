"""Which samples are taken, and the first learning rate of a schedule."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Batch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler
from transformers import TrainingArguments

from lorasb.distributed.process_group import Processes
from lorasb.init import first_step_lr
from lorasb.init.auto_rate import warmup_steps
from lorasb.init.sampling import batch_size, samples_hash, select
from lorasb.init.task import to_device


def test_by_default_32_samples_or_a_thousandth_are_taken() -> None:
    for available, wanted in ((5, 5), (40, 32), (32_001, 33)):
        loader = DataLoader([{"x": torch.zeros(1)}] * available, batch_size=16)
        samples = select(loader, None, seed=0)
        assert len(samples) == -(-wanted // 16)
        assert sum(len(batch["x"]) for batch in samples) == wanted


def test_an_iterable_without_a_size_is_taken_whole_or_in_order() -> None:
    def stream() -> Iterator[Batch]:
        yield from ({"x": torch.full((3,), float(i))} for i in range(4))

    whole = [batch["x"].tolist() for batch in select(stream(), None, seed=0)]
    assert whole == [[float(i)] * 3 for i in range(4)]
    first = [batch["x"].tolist() for batch in select(stream(), 7, seed=0)]
    assert first == [[0.0] * 3, [1.0] * 3, [2.0]]


def test_empty_batches_are_passed_over() -> None:
    samples = select(iter([{"x": torch.zeros(n)} for n in (2, 0, 3)]), None, seed=0)
    assert [len(batch["x"]) for batch in samples] == [2, 3]


def test_a_loader_with_a_sampler_of_its_own_keeps_its_choice() -> None:
    data = [{"x": torch.tensor([i])} for i in range(100)]
    for sampler in (SubsetRandomSampler(range(20)), DistributedSampler(data, num_replicas=5, rank=1)):
        chosen = set(sampler)
        samples = select(DataLoader(data, batch_size=4, sampler=sampler), 16, seed=0)
        drawn = [int(value) for batch in samples for value in batch["x"]]
        assert len(drawn) == 16
        assert set(drawn) <= chosen


def test_a_stream_of_accelerates_is_taken_in_order() -> None:
    """Its loader's `total_dataset_length` needs the data set's length, which a stream does not have."""

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Batch]:
            return ({"x": torch.tensor([i])} for i in range(48))

    loader = prepare_data_loader(DataLoader(Stream(), batch_size=4), num_processes=1, process_index=0)
    for wanted, count in ((None, 48), (16, 16)):
        assert [int(i) for batch in select(loader, wanted, seed=0) for i in batch["x"]] == list(range(count))


def test_the_boundaries_of_packed_examples_belong_to_no_row() -> None:
    """TRL's packing gives one row of all tokens, and where each example begins."""
    packed = {"input_ids": torch.arange(9).view(1, 9), "cu_seq_lens_q": torch.tensor([0, 2, 5, 9]), "max_length_q": 4}
    (found,) = select([packed], 1, seed=0)
    assert batch_size(found) == 1
    assert found["cu_seq_lens_q"].tolist() == [0, 2, 5, 9]


def test_lists_of_a_value_for_each_sample_are_taken_with_it() -> None:
    data = [
        {"x": part, "name": [str(i) for i in part.tolist()], "array": part.numpy(), "size": (2,) * len(part)}
        for part in torch.arange(10).split(4)
    ]
    sizes = {part["size"] for part in data}
    for batch in select(data, 5, seed=0):
        assert batch["name"] == [str(i) for i in batch["x"].tolist()]
        assert batch["array"].tolist() == batch["x"].tolist()
        assert batch["size"] in sizes  # a tuple counts as one value


def test_whole_batches_are_not_cut() -> None:
    data = [{"x": torch.arange(10)}] * 4
    for batches in (data, iter(data), DataLoader(data, batch_size=None)):
        assert [len(batch["x"]) for batch in select(batches, 24, seed=0, whole=True)] == [10, 10, 10]
    assert len(select([{"x": torch.arange(10)}] * 8, None, seed=0, whole=True)) == 4  # 32 samples


def test_all_values_of_samples_count() -> None:
    long = torch.zeros(5000)
    values = ([1, 2], [2, 1], np.ones(2), np.zeros(2), [long], [long.index_fill(0, torch.tensor([2500]), 1.0)])
    values += ([{"boxes": torch.ones(4)}], [{"boxes": torch.zeros(4)}], [{"masks": torch.zeros(4)}])
    batches = [{"x": torch.zeros(2)}, *({"x": torch.zeros(2), "w": w} for w in values)]
    found = [samples_hash([batch], Processes()) for batch in batches]
    assert len(set(found)) == len(batches)
    assert samples_hash([{"x": torch.zeros(2), "w": object()}], Processes()) == found[0]  # objects have no value


@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=5), share=st.floats(0.01, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_list_is_drawn_by_rows_without_repetition(rows: list[int], share: float, seed: int) -> None:
    batches = [{"x": part} for part in torch.arange(sum(rows)).split(rows)]
    wanted = max(1, int(sum(rows) * share))
    drawn, again = (torch.cat([batch["x"] for batch in select(batches, wanted, seed)]).tolist() for _ in range(2))
    assert drawn == again
    assert len(drawn) == len(set(drawn)) == wanted


FIVE = [{"x": torch.zeros(2)}, {"x": torch.zeros(3)}]


@pytest.mark.parametrize("data", [DataLoader([{"x": torch.zeros(1)}] * 5, batch_size=2), FIVE, iter(FIVE)])
def test_too_few_samples_names_both_numbers(data: object) -> None:
    with pytest.raises(ValueError, match="num_samples=9, but the batches hold 5 samples"):
        select(data, 9, seed=0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "expected at least one sample to initialize from, got none"),
        (iter([]), ValueError, "expected at least one sample to initialize from, got none"),
        ({"x": 1}, TypeError, "expected an iterable of batches"),
        ("text", TypeError, "expected an iterable of batches"),
        (3, TypeError, "expected an iterable of batches"),
        ([torch.zeros(3)], TypeError, "expected batches as dicts of tensors, got Tensor: give a collate_fn"),
        ([{"x": torch.zeros(2), "y": torch.zeros(3)}], ValueError, r"share their first dimension, got \[2, 3\]"),
    ],
)
def test_what_is_no_samples_is_refused(bad: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(bad, None, seed=0)


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ((2e-3,), 2e-3),
        ((2e-3, 20), 1e-4),
        ((2e-3, 0.1, 200), 1e-4),
        # Mistral-7B on 50,000 examples: the published code counts estimation batches of 3, not training steps of 32
        ((1e-4, 0.02, 1_563), 1e-4 / 32),
        ((1e-4, 0.02, 16_667, "published"), 2.99994e-7),
        ((1e-4, 0.5, 1, "published"), 2e-4),  # not rounded
    ],
)
def test_first_step_lr(arguments: tuple[object, ...], rate: float) -> None:
    assert first_step_lr(*arguments) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "positive learning rate"),
        ((1e-3, -1), ">= 0"),
        ((1e-3, 0.1), "give total_steps"),
        ((1e-4, 0.02, None, "published"), "give total_steps too"),
        ((1e-4, 20, 100, "published"), r"a share of the estimation's batches.*got 20 and 100"),
        ((1e-4, 0, 100, "published"), "a share of the estimation's batches"),
        ((1e-4, 0.02, 0, "published"), "a share of the estimation's batches"),
        ((1e-4, 0, None, "paper"), "expected rule to be one of schedule, published, got 'paper'"),
        (("auto", 0.1, 50, "published"), "rule='published' reproduces runs at their own rate"),
    ],
)
def test_a_first_step_without_a_rate_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_step_lr(*arguments)


def test_warm_up_steps_are_the_trainers(tmp_path: Path) -> None:
    for share, steps in ((0.1, 63), (0.5, 7), (0.0, 9), (0.06, 125), (0.02, 312), (0.1, 1)):
        arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=share)
        assert warmup_steps(share, steps) == arguments.get_warmup_steps(steps)
        assert first_step_lr(1.0, share, steps) == 1.0 / max(1, warmup_steps(share, steps))


def test_a_row_may_have_patches_and_parts_may_be_dictionaries() -> None:
    """Qwen2.5-VL's batches of one row have patches; models with several inputs have dictionaries."""
    row = {"input_ids": torch.zeros(1, 12), "pixel_values": torch.zeros(16, 96), "image_grid_thw": torch.ones(1, 3)}
    (found,) = select([row], 1, seed=0)
    assert found["pixel_values"].shape == (16, 96)
    with pytest.raises(ValueError, match=r"got \[2, 32\]: give batches of one row, or .* as a list"):
        select([{"input_ids": torch.zeros(2, 12), "pixel_values": torch.zeros(32, 96)}], 1, seed=0)
    nested = [{"x": {"v": torch.arange(40)}, "y": torch.arange(40)}]
    (drawn,) = select(nested, 32, seed=0)
    assert drawn["x"]["v"].tolist() == drawn["y"].tolist()


def test_tensors_in_lists_and_dictionaries_are_moved() -> None:
    """Detection labels are a list with a dictionary per image."""
    moved = to_device({"labels": [{"boxes": torch.zeros(2)}], "name": ["a"]}, torch.device("meta"))
    assert moved["labels"][0]["boxes"].is_meta
    assert moved["name"] == ["a"]
