"""Several processes: ranks agree to the bit, and two find what one finds, without sharding and under FSDP2."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from accelerate.data_loader import prepare_data_loader
from models import started
from processes import run_ranks
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from two_ranks import SAMPLES, write_all

from lorasb.init.cache import read
from lorasb.init.sampling import select, without_repeats

Found = dict[str, dict[str, Any]]
ALL = ["even", "uneven", "empty", "accumulate", "accumulate empty", "accumulate budget", "stability", "stability empty"]
ALL += ["cached", "again", "sharded", "sharded uneven", "sharded accumulate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, folder, partial(write_all, folder))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """The results of two ranks, by case."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def alone() -> Any:
    return started(batches=SAMPLES)[1]


@pytest.mark.parametrize("case", [*ALL, "sgd", "per-sample", "per-sample empty", "some", "stream"])
def test_ranks_agree_to_the_bit(found: Found, case: str) -> None:
    first, second = found[case]["digests"]
    assert first == second


def check_energies(found: dict[str, Any], report: Any, kind: str) -> None:
    theirs = torch.tensor([getattr(layer, kind) for layer in report.layers], dtype=torch.float64)
    tolerances.check(torch.tensor(found[kind], dtype=torch.float64), theirs, tolerances.RANKS)


@pytest.mark.parametrize("case", ALL)
def test_two_processes_find_what_one_finds(found: Found, case: str, alone: Any) -> None:
    assert found[case]["num_samples"] == alone.num_samples == 5
    assert found[case]["loss"] == pytest.approx(alone.loss, rel=1e-6)
    for kind in ("energy_sign", "energy_grad"):
        check_energies(found[case], alone, kind)


def test_second_moments_are_summed_over_ranks(found: Found) -> None:
    _, report = started(batches=SAMPLES, update="per-sample")
    for case in ("per-sample", "per-sample empty"):
        check_energies(found[case], report, "energy_grad")


def test_signs_are_one_processes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "alone.safetensors"
    started(batches=SAMPLES, cache=path)
    ours, theirs = read(folder / "signs.safetensors")[0], read(path)[0]
    assert set(ours) == set(theirs)
    differ = torch.cat([(ours[name].bits.unpack() != theirs[name].bits.unpack()).flatten() for name in ours])
    assert differ.double().mean() <= tolerances.SIGN_MISMATCH


def test_strategies_and_counts(found: Found) -> None:
    strategies = {case: values["strategy"] for case, values in found.items() if "strategy" in values}
    assert strategies.pop("again") == "cache"
    assert {case: kind for case, kind in strategies.items() if ("accumulate" in case) != (kind == "accumulate")} == {}
    assert set(strategies.values()) == {"layerwise", "accumulate"}
    assert found["some"]["num_samples"] == found["stream"]["num_samples"] == 3
    assert 0 < found["stability"]["stability"] <= 1


def test_errors_are_raised_by_all_ranks(found: Found) -> None:
    assert all("num_samples=9, but the batches hold 5 samples" in error for error in found["too many"]["errors"])
    for case in ("broken", "no labels", "no memory", "in a block", "not finite"):
        assert "none" not in found[case]["errors"], case
    first, second = found["broken"]["errors"]
    assert "initialization failed on rank 1" in first
    assert "share their first dimension" in second
    for error in found["not finite"]["errors"]:
        assert any(words in error for words in ("is inf", "NaN or Inf", "rank 1"))


@pytest.mark.parametrize("batched", [False, True])
def test_repeats_of_a_distributed_sampler_are_dropped(batched: bool) -> None:
    data = [{"x": torch.tensor([i])} for i in range(7)]
    seen = []
    for rank in range(3):
        sampler = DistributedSampler(data, 3, rank, shuffle=True, seed=4)
        options = (
            {"batch_sampler": BatchSampler(sampler, 2, False)} if batched else {"sampler": sampler, "batch_size": 2}
        )
        loader = DataLoader(data, **options)
        seen += [int(value) for batch in without_repeats(loader) for value in batch["x"]]
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize(("size", "count", "ranks"), [(2, 9, 2), (4, 10, 3), (3, 2, 2), (2, 8, 2)])
def test_repeats_of_accelerates_loaders_are_dropped(size: int, count: int, ranks: int) -> None:
    loader = DataLoader([{"x": torch.tensor([i])} for i in range(count)], batch_size=size)
    seen = []
    for rank in range(ranks):
        share = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
        with suppress(ValueError):  # for a process on its own, an empty share is an error
            seen += [int(value) for batch in select(share, None, seed=0) for value in batch["x"]]
    assert sorted(seen) == list(range(count))
