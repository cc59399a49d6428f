"""The learning rate of the step that initialization simulates."""

from __future__ import annotations

import math


def first_step_lr(lr: float, warmup_steps: float = 0, total_steps: int | None = None) -> float:
    """η = peak lr / max(1, warm-up steps): the rate of the first step that moves, as the published code takes it.

    A schedule's very first rate is 0 during a warm-up, which would initialize R to nothing.

    Args:
        lr: the schedule's peak learning rate.
        warmup_steps: number of warm-up steps, or below 1 their share of `total_steps`.
        total_steps: optimizer steps of the whole run; needed only for a share.

    Raises:
        ValueError: a rate that is not positive, negative warm-up, or a share without total_steps.
    """
    if not lr > 0:
        raise ValueError(f"expected a positive learning rate, got {lr!r}")
    if warmup_steps < 0:
        raise ValueError(f"expected warmup_steps >= 0, got {warmup_steps!r}")
    if 0 < warmup_steps < 1:
        if total_steps is None:
            raise ValueError(f"warmup_steps={warmup_steps!r} is a share of the run: give total_steps too")
        warmup_steps = math.ceil(warmup_steps * total_steps)  # as transformers counts it
    return lr / max(1.0, float(warmup_steps))
