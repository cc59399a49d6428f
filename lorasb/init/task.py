"""The input of every strategy: options, model, targets and micro-batches, with one backward per micro-batch."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..compat.peft import trained_modules_of
from ..constants import UPDATES
from ..distributed.process_group import Processes
from ..layers.adapted_layer import AdaptedLayer
from .accumulator import GradientSums
from .loss import LossFn, backward_over_samples, labeled_rows
from .sampling import Batch, batch_size
from .svd import OVERSAMPLE, MomentSketch

Layers = dict[str, AdaptedLayer]
STRATEGIES = ("auto", "layerwise", "accumulate")

NOMINAL_RATE = 1e-3  # placeholder for η until the rate is measured and the start rescaled


@dataclass(frozen=True)
class AutoRate:
    """A learning rate that `initialize` measures on its samples; the first step's η is this rate over `divisor`."""

    divisor: float = 1.0


@dataclass(frozen=True)
class InitOptions:
    """The arguments of `initialize`, which describes them, except the model and the batches."""

    adapter: str = ""
    lr: float | AutoRate = 0.0
    update: str = "adamw"
    seed: int = 0
    longest_start: float | None = None
    num_samples: int | None = None
    strategy: str = "auto"
    blocks: str | None = None
    memory_budget: float | None = None  # bytes
    loss_fn: LossFn | None = None
    cache: str | os.PathLike[str] | None = None
    stability: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("update", UPDATES), ("strategy", STRATEGIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.longest_start is not None and not self.longest_start >= 0:
            raise ValueError(f"expected longest_start >= 0 (steps) or None (no limit), got {self.longest_start!r}")
        if self.update != "adamw" and self.cache is not None:
            needs = "the gradient itself" if self.update == "sgd" else "each sample's gradient"
            raise ValueError(f"update={self.update!r} needs {needs}, and a cache keeps its signs only: leave cache out")
        if self.stability and self.whole_batches:
            raise ValueError("stability splits batches in half, but this loss needs whole ones (pairs): leave it out")
        if self.stability and self.update == "per-sample":
            raise ValueError(
                "stability compares subspaces of sign(G), and update='per-sample' uses others: leave stability out"
            )

    @property
    def eta(self) -> float:
        """η: `lr`, or `NOMINAL_RATE` until it is measured."""
        return NOMINAL_RATE if isinstance(self.lr, AutoRate) else float(self.lr)

    @property
    def whole_batches(self) -> bool:
        """True if the loss needs whole batches (pairs), so that their samples cannot be separated."""
        return getattr(self.loss_fn, "of_whole_batches", False)

    def seed_of(self, layer: str) -> int:
        """A layer's own seed, which depends neither on the other layers nor on their order."""
        return self.seed + zlib.crc32(layer.encode())  # `hash` is salted differently in every process


@dataclass(frozen=True)
class Piece:
    """A micro-batch; `counts` is False for a filler that only takes part in the collectives of a sharded model."""

    batch: Batch
    counts: bool = True


@dataclass
class Work:
    """A model, its targets, and the micro-batches of this rank over which their gradients are summed."""

    model: nn.Module
    layers: Layers
    pieces: list[Piece]
    options: InitOptions
    processes: Processes
    tick: Callable[[], object] = lambda: None  # called after every micro-batch of every block or pass
    loss: float = 0.0  # Σ of the samples' losses
    labeled: int = 0  # number of samples that have a loss

    @property
    def device(self) -> torch.device:
        """The device of the first target, to which batches are moved."""
        # R's device: the base weight of an offloaded layer is on the meta device.
        return next(next(iter(self.layers.values())).lorasb_R.parameters()).device

    def sketch(self, name: str) -> MomentSketch | None:
        """An empty sketch of a layer's second moments, with the same start on every rank; None unless "per-sample"."""
        if self.options.update != "per-sample":
            return None
        layer = self.layers[name]
        r, seed = layer.adapters[self.options.adapter].r, self.options.seed_of(name)
        return MomentSketch((layer.out_features, layer.in_features), r, seed)

    def sum_bytes(self, layer: AdaptedLayer) -> int:
        """Bytes of a layer's ΣG [out, in] in fp32, and of its sketch's sums and starts, if there is one."""
        m, n = layer.out_features, layer.in_features
        q = min(layer.adapters[self.options.adapter].r + OVERSAMPLE, m, n) if self.options.update == "per-sample" else 0
        return 4 * (m * n + 2 * q * (m + n))

    def backward(self, piece: Piece, sums: GradientSums) -> None:
        """Run a micro-batch forward and backward, which adds to `sums` and to the sum of the samples' losses."""
        sums.muted = not piece.counts
        own_loss = self.options.loss_fn is None
        loss = backward_over_samples(self.model, to_device(piece.batch, self.device), self.options.loss_fn)
        if piece.counts:
            self.loss += loss
            self.labeled += labeled_rows(piece.batch) if own_loss else batch_size(piece.batch)
        self.tick()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a copy of a batch with its tensors on a device, also those in lists and dictionaries."""
    moved: Batch = send_to_device(dict(batch), device)
    return moved


EXTRA_OUTPUTS = ("use_cache", "output_hidden_states", "output_attentions")


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore each module's training or evaluation mode on exit: users may have set some blocks differently."""
    with ExitStack() as restored:
        for module in model.modules():
            restored.callback(setattr, module, "training", module.training)
        yield


@contextmanager
def frozen_base(model: nn.Module, adapter: str) -> Iterator[None]:
    """Freeze a model: evaluation mode, the adapter's heads alone, no KV cache or weight gradients; restored on exit."""
    # A KV cache would grow at every recomputation of a block, which would then attend to its own keys twice; output
    # hidden states and attentions only take memory. Keyed by id: submodules share config objects.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    with ExitStack() as restored, modes_restored(model), torch.enable_grad():  # the caller may be under no_grad
        restored.enter_context(trained_modules_of(model, adapter))
        for parameter in model.parameters():
            restored.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)  # gradients come from hooks: no weight may get a `.grad`
        for layer in model.modules():
            if isinstance(layer, AdaptedLayer):
                restored.callback(setattr, layer, "_disable_adapters", layer._disable_adapters)
                layer._disable_adapters = True
        for config, name in itertools.product(configs.values(), EXTRA_OUTPUTS):
            if vars(config).get(name) is True:
                restored.callback(setattr, config, name, True)
                setattr(config, name, False)
        model.eval()
        yield
