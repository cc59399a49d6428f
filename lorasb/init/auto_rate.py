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
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from ..distributed.process_group import sharded
from ..layers.linear import LoRASBLinear
from .task import Work, frozen_base, to_device

# Relative change of a layer's output by an aligned step. In the committed sweeps (SmolLM2, the sign's start at r = 4,
# 16 and 64) the best is 0.003 to 0.008 for chain_sum and 0.024 to 0.06 for word reversal, at every rank.
RHO = 0.015
FALLBACK = 2e-3  # where nothing can be measured


def _add_squares(total: Tensor, adapter: str, layer: LoRASBLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """A forward hook: add ‖A x‖² and ‖W x‖² over tokens."""
    x, a = inputs[0], layer.lorasb_A[adapter]
    if not a.is_meta:  # offloaded: there only inside of the layer's own forward with an adapter
        u = x.to(a.dtype) @ a.t()
        found = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in (u, output)]
        total += torch.stack(found).double().cpu()


def measured_rate(work: Work) -> float:
    """ρ over the median of s·r·rms‖A x‖ / rms‖W x‖ of the linear layers that the samples reach, by one forward.

    `FALLBACK`, with a warning, where it cannot be measured.
    """
    if sharded(work.model):
        return _fall_back("the model is sharded")
    adapter = work.options.adapter
    layers = [layer for layer in work.layers.values() if isinstance(layer, LoRASBLinear)]
    table = torch.zeros(len(layers), 2, dtype=torch.float64)
    with frozen_base(work.model), torch.no_grad(), ExitStack() as hooks:
        for layer, row in zip(layers, table, strict=True):
            hooks.enter_context(layer.register_forward_hook(partial(_add_squares, row, adapter)))
        for piece in work.pieces:
            batch = to_device(piece.batch, work.device)
            if work.options.loss_fn is None:
                work.model(**batch)
            else:
                work.options.loss_fn(work.model, batch)
    leverages = []
    for layer, (low, whole) in zip(layers, work.processes.all_reduce_sum(table).tolist(), strict=True):
        if low > 0 and whole > 0 and math.isfinite(low / whole):
            state = layer.adapters[adapter]
            leverages.append(state.scaling * state.r * math.sqrt(low / whole))
    if not leverages:
        return _fall_back("no activations of a linear layer are finite and not zero")
    return RHO / statistics.median(leverages)


def _fall_back(reason: str) -> float:
    warnings.warn(f"lr='auto' takes {FALLBACK:g}, as {reason}: pass a rate, or try some (find_lr)", stacklevel=2)
    return FALLBACK
