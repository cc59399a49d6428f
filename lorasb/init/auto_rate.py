"""The learning rate of R, from what a step of AdamW does to the outputs of layers, measured on the samples.

A step of AdamW changes every entry of R by about the rate, with the signs of its gradient. Where these align with
u = A x of a token, ‖ΔR u‖ is about lr·r·‖u‖, and the layer's output W x changes by s·lr·r·‖A x‖, as B is orthonormal.
Relative to the output that is ρ = lr·leverage, with the leverage s·r·rms‖A x‖ / rms‖W x‖. The best rates of a task
differ by up to 128 times between ranks and starts, and their ρ by about four times: so the rate is ρ over the median
leverage of the layers.
"""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.process_group import sharded
from ..layers.linear import LoRASBLinear
from .task import Layers, Work, to_device

# Relative change of a layer's output by an aligned step. In the committed sweeps (SmolLM2, the sign's start at r = 4,
# 16 and 64) the best is 0.003 to 0.008 for chain_sum and 0.024 to 0.06 for word reversal, at every rank.
RHO = 0.015
FALLBACK = 2e-3  # where nothing can be measured


class _Sums:
    """Σ‖A x‖² and Σ‖W x‖² over tokens of each layer, from hooks."""

    def __init__(self, layers: dict[str, LoRASBLinear], adapter: str) -> None:
        self.layers, self.adapter = layers, adapter
        self.squares = {name: torch.zeros(2, dtype=torch.float64) for name in layers}

    def hook(self, name: str) -> Any:
        layer = self.layers[name]

        def _add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, a = inputs[0], layer.lorasb_A[self.adapter]
            if a.is_meta:  # offloaded: there only inside of the layer's own forward with an adapter
                return
            u = x.to(a.dtype) @ a.t()
            found = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in (u, output)]
            self.squares[name] += torch.stack(found).double().cpu()

        return _add


@torch.no_grad()
def leverages(work: Work) -> dict[str, float]:
    """s·r·rms‖A x‖ / rms‖W x‖ of each linear layer that the samples reach, by one forward over them."""
    adapter = work.options.adapter
    layers = {name: layer for name, layer in work.layers.items() if isinstance(layer, LoRASBLinear)}
    sums = _Sums(layers, adapter)
    handles = [layer.register_forward_hook(sums.hook(name)) for name, layer in layers.items()]
    try:
        for piece in work.pieces:
            batch = to_device(piece.batch, work.device)
            if work.options.loss_fn is None:
                work.model(**batch)
            else:
                work.options.loss_fn(work.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    table = torch.stack(list(sums.squares.values())) if layers else torch.zeros(0, 2, dtype=torch.float64)
    found = {}
    for (name, layer), (low, whole) in zip(layers.items(), work.processes.all_reduce_sum(table).tolist(), strict=True):
        state = layer.adapters[adapter]
        if low > 0 and whole > 0 and math.isfinite(low / whole):
            found[name] = state.scaling * state.r * math.sqrt(low / whole)
    return found


def measured_rate(work: Work) -> float:
    """ρ over the median leverage; `FALLBACK`, with a warning, where no layer has one."""
    if sharded(work.model):
        return _fall_back("the model is sharded")
    found = leverages(work)
    if not found:
        return _fall_back("no activations of a linear layer are finite and not zero")
    return RHO / statistics.median(found.values())


@torch.no_grad()
def scale_starts(layers: Layers, adapter: str, factor: float) -> None:
    """Multiply every R of a start, which is proportional to its η."""
    for layer in layers.values():
        layer.lorasb_R[adapter].mul_(factor)


def _fall_back(reason: str) -> float:
    warnings.warn(f"lr='auto' takes {FALLBACK:g}, as {reason}: pass a rate, or try some (find_lr)", stacklevel=2)
    return FALLBACK
