"""Collectives over torch.distributed's default group, no-ops in a single process; and errors raised on every rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """torch.distributed's default group, or a single process where none is initialized.

    All methods that communicate are collectives: every rank has to call them, in the same order.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.world_size = dist.get_world_size() if initialized else 1

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def _device(self) -> torch.device:
        """The device that the backend communicates from: NCCL takes CUDA tensors only, gloo takes them on the CPU."""
        nccl = dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _buffer(self, tensor: Tensor) -> Tensor:
        device = self._device()
        return (tensor if tensor.device.type == device.type else tensor.to(device)).contiguous()

    def _gathered(self, local: Tensor) -> list[Tensor]:
        """The tensors of all ranks on the CPU, by rank; the shape has to be the same on every rank."""
        local = local.to(self._device())
        gathered = [torch.zeros_like(local) for _ in range(self.world_size)]
        dist.all_gather(gathered, local)
        return [part.cpu() for part in gathered]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, bitwise equal on every rank. May overwrite `tensor`."""
        if not self.is_distributed:
            return tensor
        buffer = self._buffer(tensor)
        dist.all_reduce(buffer)
        return buffer.to(tensor.device)

    def all_gather(self, value: int) -> list[int]:
        """The value of every rank, by rank."""
        return [int(number) for number in self._gathered(torch.tensor([value]))] if self.is_distributed else [value]

    def gather_json(self, value: object) -> list[Any]:
        """The JSON values of all ranks, by rank."""
        if not self.is_distributed:
            return [value]
        text = json.dumps(value).encode()
        text = text.ljust(max(self.all_gather(len(text))))  # equal lengths: JSON ignores spaces
        parts = self._gathered(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return [json.loads(bytes(part.numpy())) for part in parts]

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """Rank `owner`'s tensor; every rank passes one of the same shape and dtype. May overwrite `tensor`."""
        if not self.is_distributed:
            return tensor
        buffer = self._buffer(tensor)
        dist.broadcast(buffer, owner)
        return buffer.to(tensor.device)

    @contextmanager
    def together(self, doing: str = "initialization") -> Iterator[None]:
        """Run a block that may fail on some ranks, between collectives: its error is raised on every rank."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_on_every_rank(error, doing)

    def raise_on_every_rank(self, error: BaseException | None, doing: str = "initialization") -> None:
        """Raise `error` on the ranks that have one, and a RuntimeError on all others if any has one."""
        if self.is_distributed:  # a rank that continued alone would wait in the next collective forever
            failed = [rank for rank, bad in enumerate(self.all_gather(int(error is not None))) if bad]
            if failed and error is None:
                raise RuntimeError(f"{doing} failed on rank {failed[0]} (see its log); the model is unchanged")
        if error is not None:
            raise error


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded value of a tensor; a collective if FSDP2 has made it a DTensor."""
    value: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return value.detach()


def sharded(model: nn.Module) -> bool:
    """True if a parameter is a DTensor (FSDP2): a forward then all-gathers, so every rank must run the same ones."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
