"""Several processes: ranks agree to the bit, and two find what one finds, without sharding and under FSDP2."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from models import Batch, make, sharded, started, text
from processes import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import lorasb
from lorasb.init.cache import read
from lorasb.init.sampling import select, without_repeats
from lorasb.layers.linear import LoRASBLinear

Found = dict[str, dict[str, Any]]
ALL = ["even", "uneven", "empty", "accumulate", "accumulate empty", "accumulate budget", "stability", "stability empty"]
ALL += ["cached", "again", "sharded", "sharded uneven", "sharded accumulate"]
SAMPLES = [text(1, tokens, seed) for seed, tokens in enumerate((12, 7, 9, 5, 11))]


def digest(model: nn.Module) -> str:
    """SHA-256 of all factors."""
    found = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if "lorasb_" in name:
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            found.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def run(batches: list[Batch], shard: bool = False, **options: Any) -> dict[str, Any]:
    """Initialize; return the digest of every rank, and the report's values with the energies."""
    model: Any = lorasb.patch(make("llama"), r=4)
    if shard:
        model = sharded(model)
    report = lorasb.initialize(model, batches, lr=1e-3, **{"progress": False} | options)
    layers = [module for module in model.modules() if isinstance(module, LoRASBLinear)]
    if shard:
        assert all(isinstance(layer.lorasb_A["default"], DTensor) for layer in layers)
    every: list[Any] = [None, None]
    dist.all_gather_object(every, digest(model))
    model.train()
    model(**SAMPLES[0]).loss.backward()
    found = {name: getattr(report, name) for name in ("strategy", "num_samples", "loss", "stability")}
    of_layers = ("energy_sign", "energy_grad", "zeros")
    return found | {"digests": every} | {name: [getattr(one, name) for one in report.layers] for name in of_layers}


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the error that each rank raised."""
    every: list[Any] = [None, None]
    try:
        call()
        mine = "none"
    except Exception as error:
        mine = f"{type(error).__name__}: {error}"
    dist.all_gather_object(every, mine)
    return {"errors": every}


def broken(rank: int) -> list[Batch]:
    """Batches that cannot be collated on rank 1."""
    return SAMPLES[:2] if rank == 0 else [{"input_ids": torch.zeros(1, 3), "labels": torch.zeros(2, 3)}]


def failing(rank: int) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """A loss function that leaves rank 1's first block unable to be recomputed."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = model(**batch).loss
        if rank == 1:
            model.get_base_model().model.layers[0].self_attn.forward = None
        return loss

    return loss_fn


def write_all(folder: Path, rank: int) -> None:
    """Run every case on this rank; the first rank writes the results."""
    even, uneven = SAMPLES[rank::2], SAMPLES[:4] if rank == 0 else SAMPLES[4:]
    cache = folder / "signs.safetensors"

    unlabeled = [{key: value for key, value in batch.items() if key != "labels"} for batch in even]

    def share() -> Any:
        """A stream of all samples on rank 0, and an empty one on rank 1."""
        return iter(SAMPLES if rank == 0 else [])

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "even": lambda: run(even),
        "uneven": lambda: run(uneven),
        "empty": lambda: run(share()),
        "accumulate": lambda: run(even, strategy="accumulate"),
        "stability": lambda: run(even, stability=True),
        "sgd": lambda: run(even, update="sgd"),
        "per-sample": lambda: run(uneven, update="per-sample"),
        "per-sample empty": lambda: run(share(), update="per-sample"),
        "some": lambda: run(uneven, num_samples=3),
        "stream": lambda: run(iter(uneven), num_samples=3),  # type: ignore[arg-type]
        "cached": lambda: run(even, cache=cache),
        "again": lambda: run(even, cache=cache),
        "accumulate empty": lambda: run(share(), strategy="accumulate"),
        "accumulate budget": lambda: run(uneven, strategy="accumulate", memory_budget="250KB"),
        "stability empty": lambda: run(share(), stability=True),
        "sharded": lambda: run(even, shard=True),
        "sharded uneven": lambda: run(share(), shard=True),
        "sharded accumulate": lambda: run(uneven, shard=True, strategy="accumulate"),
        "too many": lambda: error_of(lambda: run(even, num_samples=9)),
        "broken": lambda: error_of(lambda: run(broken(rank))),
        "no labels": lambda: error_of(lambda: run(unlabeled if rank else even, strategy="accumulate")),
        "no memory": lambda: error_of(lambda: run(even, memory_budget=1e3 if rank else 1e9, strategy="layerwise")),
        "in a block": lambda: error_of(lambda: run(even, loss_fn=failing(rank))),
        "not finite": lambda: error_of(lambda: run(even, loss_fn=lambda m, b: m(**b).loss * float(1 + 9e38 * rank))),
    }
    for name, case in cases.items():
        found = case()
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))


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
