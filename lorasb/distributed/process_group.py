"""Several processes: sums over all of them, one owner a layer, and errors that all of them raise."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """The processes of torch.distributed's default group, or this one alone."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def several(self) -> bool:
        """Whether there is anybody else."""
        return self.size > 1

    def _device(self) -> torch.device:
        return (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )

    def _somewhere(self, tensor: Tensor) -> Tensor:
        """The tensor where this group's backend can take it."""
        wanted = self._device()
        return tensor if tensor.device.type == wanted.type else tensor.to(wanted)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Σ over processes, the same bits everywhere."""
        if not self.several:
            return tensor
        moved = self._somewhere(tensor).contiguous()
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def gather(self, value: int) -> list[int]:
        """Everybody's number, by rank."""
        if not self.several:
            return [value]
        mine = torch.tensor([value], device=self._device())
        every = [torch.zeros_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [int(number) for number in every]

    def largest(self, values: list[float]) -> list[float]:
        """Of each number, the largest that a process has: what is decided by it is decided alike."""
        if not self.several:
            return values
        mine = torch.tensor(values, dtype=torch.float64, device=self._device())
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return mine.tolist()

    def smallest(self, values: list[float]) -> list[float]:
        """Of each number, the smallest that a process has."""
        return [-value for value in self.largest([-value for value in values])]

    def gather_bytes(self, mine: bytes) -> bytes:
        """Everybody's bytes of one length, one after another."""
        if not self.several:
            return mine
        sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device())
        every = [torch.zeros_like(sent) for _ in range(self.size)]
        dist.all_gather(every, sent)
        return b"".join(bytes(part.cpu().numpy()) for part in every)

    def from_owner(self, tensor: Tensor, owner: int) -> Tensor:
        """The owner's tensor; everybody passes one of the same shape and dtype."""
        if not self.several:
            return tensor
        moved = self._somewhere(tensor).contiguous()
        dist.broadcast(moved, owner)
        return moved.to(tensor.device)

    def any_batch(self, mine: dict[str, Any] | None) -> dict[str, Any] | None:
        """A batch of tensors of the first process that has one: what shapes it has goes as JSON."""
        have = self.gather(int(mine is not None))
        if not any(have):
            return None
        owner = have.index(1)
        tensors = {name: t for name, t in (mine or {}).items() if isinstance(t, Tensor)}
        about = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}
        text = json.dumps(about).encode()
        size = self.gather(len(text))[owner]
        header = torch.frombuffer(bytearray(text.ljust(size)[:size]), dtype=torch.uint8)
        about = json.loads(bytes(self.from_owner(header, owner).numpy()))
        blank = {name: torch.zeros(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in about.items()}
        source = tensors if self.rank == owner else blank
        return {name: self.from_owner(source[name].cpu(), owner) for name in about}

    def agree(self, error: BaseException | None, doing: str = "initialization") -> None:
        """Raise one's own error, or say that another process met one at what all are `doing`: nobody goes on alone.

        Raises:
            RuntimeError: another process failed.
        """
        if self.several:
            failed = [rank for rank, bad in enumerate(self.gather(int(error is not None))) if bad]
            if failed and error is None:
                raise RuntimeError(f"{doing} failed on rank {failed[0]}, which shows why: nothing was changed")
        if error is not None:
            raise error

    def common_hash(self, mine: str) -> str:
        """One hash of everybody's."""
        return hashlib.sha256(self.gather_bytes(bytes.fromhex(mine))).hexdigest() if self.several else mine


def sharded(model: nn.Module) -> bool:
    """Whether parameters are DTensors, whose forwards all processes have to make together."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
