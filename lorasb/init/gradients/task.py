"""The input of every strategy: model, targets and micro-batches, with one backward per micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.process_group import Processes
from ...layers.linear import LoRASBLinear
from ..linalg.moment_sketch import MomentSketch
from ..sampling import Batch, batch_size, take_rows
from .loss import LossFn, backward_over_samples, labeled_rows

Layers = dict[str, LoRASBLinear]


@dataclass(frozen=True)
class Piece:
    """A micro-batch.

    Attributes:
        batch: tensors by name.
        first_half: True if the samples belong to the first half (`stability`).
        counts: False for a filler that only takes part in the collectives of a sharded model.
    """

    batch: Batch
    first_half: bool = False
    counts: bool = True


@dataclass
class Work:
    """A model, its targets and the micro-batches that their gradients are summed over.

    Attributes:
        model: the patched model.
        layers: targets, by name.
        pieces: micro-batches of this rank.
        loss_fn: the caller's loss, or None for the model's own.
        processes: the process group.
        halves: True if the first half of the samples is summed separately, too.
        values: True if the values of ΣG are needed (SGD), not only its signs.
        sketches: makes a layer's empty sketch of second moments, if they are wanted.
        sketch_rank: the largest rank that sketches are for; 0 without any.
        tick: called after every micro-batch of every block or pass, for progress bars.
        expect: called with the number of remaining ticks, once it is known.
        loss: Σ of the samples' losses.
        labeled: number of samples that have a loss.
    """

    model: nn.Module
    layers: Layers
    pieces: list[Piece]
    loss_fn: LossFn | None
    processes: Processes
    halves: bool = False
    values: bool = False
    sketches: Callable[[str], MomentSketch] | None = None
    sketch_rank: int = 0
    tick: Callable[[], Any] = field(default=lambda: None)
    expect: Callable[[int], Any] = field(default=lambda remaining: None)
    loss: float = 0.0
    labeled: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the first target, where the batches are moved to."""
        # R's device: the base weight of an offloaded layer is on the meta device.
        return next(next(iter(self.layers.values())).lorasb_R.parameters()).device

    def backward(self, piece: Piece) -> None:
        """Forward and backward of a micro-batch, with the sum of its samples' losses."""
        loss = backward_over_samples(self.model, to_device(piece.batch, self.device), self.loss_fn)
        if piece.counts:
            self.loss += loss
            self.labeled += batch_size(piece.batch) if self.loss_fn is not None else labeled_rows(piece.batch)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of a batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def in_halves(batches: list[Batch]) -> Iterator[Piece]:
    """Assign the samples to two halves: every batch is split, and batches of one sample alternate."""
    first_half = False
    for batch in batches:
        rows = batch_size(batch)
        if rows == 1:
            first_half = not first_half
            yield Piece(batch, first_half)
            continue
        yield Piece(take_rows(batch, torch.arange(rows // 2)), True)
        yield Piece(take_rows(batch, torch.arange(rows // 2, rows)), False)
