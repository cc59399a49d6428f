"""The learning rate of R: a schedule's first-step rate, or a rate measured from how a step changes layer outputs.

An AdamW step changes every entry of R by about the rate, with the signs of its gradient. Where these signs align with
u = A x of a token, ‖ΔR u‖ is about lr·r·‖u‖, and the layer's output W x changes by s·lr·r·‖A x‖, as B is orthonormal.
Relative to the output, that is ρ = lr·leverage, with leverage = s·r·rms‖A x‖ / rms‖W x‖. A task's best rates differ by
a factor of over a thousand between ranks and starts, but their ρ only by about four. So the rate is ρ over the layers'
median leverage.
"""

from __future__ import annotations

import math
import statistics
import warnings
from contextlib import ExitStack
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ..distributed.process_group import sharded
from ..layers.linear import LoRASBLinear
from ..utils.checks import MAX_LR, check_lr
from .task import AutoRate, Work, frozen_base, to_device

# Relative change of a layer's output from an aligned step. In the committed sweeps (SmolLM2, starting from the sign at
# r = 4, 16 and 64), the best are 0.003 to 0.008 for chain_sum and 0.024 to 0.06 for word reversal, at every rank.
RHO = 0.015
# If nothing can be measured, the rate is this over s·r, as measured rates fall roughly as 1/r; 2e-3 at r = 64.
FALLBACK = 0.128


def _add_squares(total: Tensor, adapter: str, layer: LoRASBLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: add ‖A x‖² and ‖W x‖², summed over tokens, to `total`."""
    x, a = inputs[0], layer.lorasb_A[adapter]
    if not a.is_meta:  # offloaded factors are present only inside the layer's own forward with an adapter
        u = x.to(a.dtype) @ a.t()
        found = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in (u, output)]
        total += torch.stack(found).cpu().double()


def measured_rate(work: Work) -> float:
    """Return ρ over the median leverage, in one forward, of linear layers that samples reach; or `FALLBACK` / (s·r)."""
    adapter = work.options.adapter
    ranks = [layer.adapters[adapter].r * layer.adapters[adapter].scaling for layer in work.layers.values()]
    fallback = FALLBACK / (statistics.median(ranks) or 1.0)
    if sharded(work.model):
        return _fall_back(fallback, "the model is sharded")
    layers = [layer for layer in work.layers.values() if isinstance(layer, LoRASBLinear)]
    table = torch.zeros(len(layers), 2, dtype=torch.float64)
    together = work.processes.together("measuring activations")
    with together, frozen_base(work.model, adapter), torch.no_grad(), ExitStack() as hooks:
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
        if whole > 0 and 0 < low / whole < math.inf:
            state = layer.adapters[adapter]
            leverages.append(state.scaling * state.r * math.sqrt(low / whole))
    if not leverages:
        return _fall_back(fallback, "no activations of a linear layer are finite and not zero")
    rate = RHO / statistics.median(leverages)
    return rate if rate <= MAX_LR else _fall_back(fallback, f"the samples ask for {rate:.2g}, more than {MAX_LR:g}")


def _fall_back(rate: float, reason: str) -> float:
    given = f"lr='auto' falls back to {rate:g}, as {reason}"
    warnings.warn(f"{given}: pass a rate, or search for one (find_lr)", stacklevel=2)
    return rate


@overload
def first_step_lr(lr: float, warmup_steps: float = ..., total_steps: int | None = ..., rule: str = ...) -> float: ...


@overload
def first_step_lr(
    lr: Literal["auto"], warmup_steps: float = ..., total_steps: int | None = ..., rule: str = ...
) -> AutoRate: ...


def first_step_lr(
    lr: float | Literal["auto"], warmup_steps: float = 0, total_steps: int | None = None, rule: str = "schedule"
) -> float | AutoRate:
    """Return η for `initialize`: peak lr / warm-up steps, the rate of the first step that moves (step 0 has rate 0).

    The published code counts batches of its gradient-estimation loader (3 examples each for Mistral-7B) instead of
    optimizer steps (of 32), so its η is 10 times smaller there:
    `first_step_lr(1e-4, 0.02, total_steps=len(loader) * epochs, rule="published")`.

    Args:
        lr: the schedule's peak learning rate, or "auto": `initialize` then measures it, and its report's `rate` is the
            peak to train with.
        warmup_steps: number of warm-up steps, or, below 1, their fraction of `total_steps`.
        total_steps: needed for a fraction: the run's optimizer steps; with rule="published", the loader's batches
            times epochs.
        rule: "schedule" (at least one step; a fraction is rounded up) or "published" (a fraction is not rounded).

    Raises:
        ValueError: a rate that is not positive, negative warm-up, a fraction without total_steps, an unknown rule, or
            the published one without a fraction or with "auto".
    """
    if lr == "auto":
        if rule == "published":
            raise ValueError("rule='published' reproduces runs at their own rate: pass it instead of lr='auto'")
        return AutoRate(1.0 / first_step_lr(1.0, warmup_steps, total_steps, rule))
    check_lr(lr)
    if warmup_steps < 0:
        raise ValueError(f"expected warmup_steps >= 0, got {warmup_steps!r}")
    if rule not in ("schedule", "published"):
        raise ValueError(f"expected rule to be one of schedule, published, got {rule!r}")
    is_share = 0 < warmup_steps < 1
    if is_share and total_steps is None:
        raise ValueError(f"warmup_steps={warmup_steps!r} is a share of the run: give total_steps too")
    steps = warmup_steps * (total_steps or 0) if is_share else warmup_steps
    if rule == "published":
        if not is_share or not steps > 0:
            raise ValueError(
                "rule='published' divides by a share of the estimation's batches: give warmup_steps between 0 and 1 "
                f"and total_steps=len(loader) * epochs, got {warmup_steps!r} and {total_steps!r}"
            )
        return lr / steps
    return lr / max(1.0, math.ceil(steps) if is_share else steps)


def warmup_steps(share: float, total_steps: int) -> int:
    """Return a run's warm-up steps for a share in [0, 1), rounded up as in `TrainingArguments.get_warmup_steps`."""
    return math.ceil(share * total_steps)
