"""The input of every strategy: model, targets and micro-batches, with one backward per micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.process_group import Processes
from ..layers.linear import LoRASBLinear
from .loss import LossFn, backward_over_samples, labeled_rows
from .sampling import Batch, batch_size, take_rows
from .svd import MomentSketch

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


def stored_16bit(batches: list[Batch]) -> Iterator[Piece]:
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


EXTRA_OUTPUTS = ("use_cache", "output_hidden_states", "output_attentions")


@contextmanager
def frozen_base(model: nn.Module, beside: Sequence[str] = ()) -> Iterator[None]:
    """Evaluation mode, adapters disabled but for those named, no KV cache, no gradients; restored on exit."""
    # The state of each module and parameter, as users may have put some blocks into another mode, or froze some.
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    states = [(m, m._disable_adapters, m._active_adapter) for m in model.modules() if isinstance(m, LoRASBLinear)]
    settings = _extra_outputs(model)
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)  # gradients come from hooks: no weight may get a `.grad`
        for layer, _, _ in states:
            layer._disable_adapters, layer._active_adapter = not beside, list(beside) or layer._active_adapter
        for config, name, _ in settings:
            setattr(config, name, False)
        with torch.enable_grad():  # the caller may be under no_grad
            yield
    finally:
        for config, name, value in settings:
            setattr(config, name, value)
        for layer, off, active in states:
            layer._disable_adapters, layer._active_adapter = off, active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _extra_outputs(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """(config, name, True) of every output besides the loss that is switched on in a config of the model.

    A KV cache would grow at every recomputation of a block, which then attends to its own keys twice; hidden states and
    attentions only take memory.
    """
    # By id: submodules share config objects, and one entry for each is enough.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [(c, name, True) for c in configs.values() for name in EXTRA_OUTPUTS if vars(c).get(name) is True]
