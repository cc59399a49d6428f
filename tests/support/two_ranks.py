"""Initialize on two ranks; each case writes its results to a JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import Batch, make, text
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lorasb
from lorasb.layers.linear import LoRASBLinear

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
    model = lorasb.patch(make("llama"), r=4)
    if shard:
        for block in (*model.get_base_model().model.layers, model):
            fully_shard(block)
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
