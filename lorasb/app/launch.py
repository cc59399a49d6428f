"""The process group of a run under `torchrun` or `accelerate launch`, and exchange of JSON between ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.process_group import Processes
from .terminal import console


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the process group, if there is one, for the length of the block; only rank 0 prints."""
    # A group that was initialized here is destroyed at the end: gloo's threads would abort the interpreter's exit.
    initialized_here = dist.is_available() and not dist.is_initialized()
    try:
        yield _begin()
    finally:
        if initialized_here and dist.is_initialized():
            dist.destroy_process_group()


def _begin() -> Processes:
    """Initialize the process group if WORLD_SIZE > 1."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # accelerate launch announces the engine to its processes in these variables
        for variable, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
            if os.environ.get(variable, "").lower() in ("1", "true"):
                raise ValueError(
                    f"lorasb finetune trains whole models side by side (DDP), and this launch asks for {engine}: "
                    "write a script with Trainer and lorasb.InitCallback() for that (docs/several-gpus.md)"
                )
        from accelerate import PartialState

        # chooses the backend (nccl, gloo) and the device of this rank, and is the state that Trainer uses
        PartialState(cpu=not torch.cuda.is_available())
    processes = Processes()
    console.quiet = processes.rank > 0
    return processes


def gather_json(value: Any, processes: Processes) -> list[Any]:
    """The values of all ranks, by rank."""
    if not processes.is_distributed:
        return [value]
    text = json.dumps(value).encode()
    # all_gather takes equal lengths: pad with spaces, which JSON ignores
    width = max(processes.all_gather(len(text)))
    gathered = processes.all_gather_bytes(text.ljust(width))
    return [json.loads(gathered[start : start + width]) for start in range(0, len(gathered), width)]
