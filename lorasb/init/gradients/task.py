"""What every strategy works on: the model, its targets, the samples, and one backward at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.process_group import Processes
from ...layers.linear import LoRASBLinear
from ..sampling import Batch, batch_size, take_rows
from .loss import LossFn, backward_over_samples, labeled_rows

Layers = dict[str, LoRASBLinear]


@dataclass(frozen=True)
class Piece:
    """A micro-batch. One that does not `count` keeps step with other processes and adds nothing."""

    batch: Batch
    first_half: bool = False
    counts: bool = True


@dataclass
class Work:
    """A model and what its gradients are summed over.

    Attributes:
        halves: sums over the first half of the samples are kept beside those over all.
        values: the sums themselves are needed, not their signs alone.
        tick: called after every micro-batch of every block or pass.
        loss, labeled: Σ of losses, and number of samples that have one.
        expect: called with the number of ticks that are still to come, once it is known.
    """

    model: nn.Module
    layers: Layers
    pieces: list[Piece]
    loss_fn: LossFn | None
    processes: Processes
    halves: bool = False
    values: bool = False
    tick: Callable[[], Any] = field(default=lambda: None)
    expect: Callable[[int], Any] = field(default=lambda remaining: None)
    loss: float = 0.0
    labeled: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model takes its batches."""
        return next(next(iter(self.layers.values())).lorasb_R.parameters()).device

    def backward(self, piece: Piece) -> None:
        """Backward through a micro-batch's summed loss."""
        loss = backward_over_samples(self.model, to_device(piece.batch, self.device), self.loss_fn)
        if piece.counts:
            self.loss += loss
            self.labeled += batch_size(piece.batch) if self.loss_fn is not None else labeled_rows(piece.batch)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors there."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def in_halves(batches: list[Batch]) -> Iterator[Piece]:
    """Micro-batches of the two halves of the samples: every batch is cut, single samples alternate."""
    turn = False
    for batch in batches:
        rows = batch_size(batch)
        if rows == 1:
            turn = not turn
            yield Piece(batch, turn)
            continue
        yield Piece(take_rows(batch, torch.arange(rows // 2)), True)
        yield Piece(take_rows(batch, torch.arange(rows // 2, rows)), False)
