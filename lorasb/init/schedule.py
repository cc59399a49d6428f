"""The learning rate of the step that initialization simulates."""

from __future__ import annotations

import math


def first_step_lr(lr: float, warmup_steps: float = 0, total_steps: int | None = None) -> float:
    """η = peak lr / max(1, warm-up steps): the rate of the first step that moves, as in the published code.

    During a warm-up the rate of step 0 is 0, which would initialize R to zero.

    Args:
        lr: the schedule's peak learning rate.
        warmup_steps: number of warm-up steps, or, below 1, their fraction of `total_steps`.
        total_steps: optimizer steps of the whole run; needed only for a fraction.

    Raises:
        ValueError: a rate that is not positive, negative warm-up, or a fraction without total_steps.
    """
    if not lr > 0:
        raise ValueError(f"expected a positive learning rate, got {lr!r}")
    if warmup_steps < 0:
        raise ValueError(f"expected warmup_steps >= 0, got {warmup_steps!r}")
    if 0 < warmup_steps < 1:
        if total_steps is None:
            raise ValueError(f"warmup_steps={warmup_steps!r} is a share of the run: give total_steps too")
        warmup_steps = math.ceil(warmup_steps * total_steps)  # rounded up, as in TrainingArguments.get_warmup_steps
    return lr / max(1.0, float(warmup_steps))
