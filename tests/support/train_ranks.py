"""Train a few steps in every way, on one rank or several, and write the results as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import make, text
from torch import nn
from torch.distributed.fsdp import fully_shard

import lorasb

WAYS = ("ddp", "fsdp", "fsdp bf16", "fsdp 4-bit", "fsdp experts")
ROWS = [text(1, 12, seed) for seed in range(8)]
STEPS = 3


def model_for(way: str) -> nn.Module:
    """A patched model, before it is initialized."""
    family = "mixtral" if "experts" in way else "llama"
    base: Any = make(family, dtype=torch.bfloat16 if "bf16" in way or "4-bit" in way else torch.float32)
    if "4-bit" in way:
        base = lorasb.quantize(base, storage=torch.bfloat16)
    experts = ["experts.gate_up_proj", "experts.down_proj"] if "experts" in way else None
    return lorasb.patch(base, r=4, target_parameters=experts)


def shard(model: Any, way: str) -> nn.Module:
    """Shard the model among the processes as `way` says."""
    is_ddp = way.startswith("ddp")  # wrapped after the initialization, as Trainer does
    if dist.is_initialized() and not is_ddp:
        for block in (*model.get_base_model().model.layers, model):
            fully_shard(block)
    return model


def cores(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every R, gathered if it is sharded."""
    found = {name: p for name, p in model.named_parameters() if "lorasb_R" in name}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in found.items()}


def write_all(folder: Path, size: int, rank: int) -> None:
    """Train in every way on this rank; the first rank writes the results."""
    for way in WAYS:
        found = train(way, rank, size)
        if rank == 0:
            (folder / f"{way}.{size}.json").write_text(json.dumps(found))


def train(way: str, rank: int, size: int) -> dict[str, Any]:
    """Train a few steps; return the losses, every R before them, and how far each has moved."""
    model = shard(model_for(way), way)
    lorasb.initialize(model, ROWS[rank::size], lr=1e-2, progress=False)
    start = cores(model)
    model.train()
    run: Any = nn.parallel.DistributedDataParallel(model) if way.startswith("ddp") and size > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for step in range(STEPS):
        rows = [ROWS[(step * 4 + i) % 8] for i in range(4)][rank::size]
        loss = sum(run(**row).loss for row in rows) / len(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = torch.tensor(loss.item() / size)
        if size > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    moved = {name: value - start[name] for name, value in cores(model).items()}
    values = {"start": start, "moved": moved}
    return {"losses": losses, **{key: {n: v.tolist() for n, v in part.items()} for key, part in values.items()}}
