"""The processes of a run that `torchrun` or `accelerate launch` started: begun here, and what they tell one another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.process_group import Processes
from .console import console


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes, if there are any, for the length of the block; the first alone prints.

    A process group that was begun here is left in order: threads of gloo that the interpreter's exit meets abort it.

    Raises:
        ValueError: they were started for an engine that shards the model.
    """
    begun = dist.is_available() and not dist.is_initialized()
    try:
        yield _begin()
    finally:
        if begun and dist.is_initialized():
            dist.destroy_process_group()


def _begin() -> Processes:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
            if os.environ.get(variable, "").lower() in ("1", "true"):
                raise ValueError(
                    f"lorasb finetune trains whole models side by side (DDP), and this launch asks for {engine}: "
                    "write a script with Trainer and lorasb.InitCallback() for that (docs/several-gpus.md)"
                )
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    processes = Processes()
    console.quiet = processes.rank > 0
    return processes


def gather_json(value: Any, processes: Processes) -> list[Any]:
    """Everybody's value, by rank."""
    if not processes.is_distributed:
        return [value]
    text = json.dumps(value).encode()
    width = max(processes.all_gather(len(text)))
    every = processes.all_gather_bytes(text.ljust(width))
    return [json.loads(every[start : start + width]) for start in range(0, len(every), width)]
