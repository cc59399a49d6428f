"""The learning rate of the step that initialization simulates."""

from __future__ import annotations

import math

from ..utils.checks import check_lr

RULES = ("schedule", "published")


def first_step_lr(lr: float, warmup_steps: float = 0, total_steps: int | None = None, rule: str = "schedule") -> float:
    """η = peak lr / warm-up steps: the rate of the first step that moves, which the initialization simulates.

    During a warm-up the rate of step 0 is 0, which would initialize R to zero.

    The published code has the same formula with other steps: it counts the batches of the loader from which it
    estimates gradients (3 examples each for Mistral-7B) where the optimizer's own steps are of 32, so that its η is 10
    times smaller there. `first_step_lr(1e-4, 0.02, total_steps=len(loader) * epochs, rule="published")` repeats it.

    Args:
        lr: the schedule's peak learning rate.
        warmup_steps: number of warm-up steps, or, below 1, their fraction of `total_steps`.
        total_steps: optimizer steps of the whole run; needed only for a fraction. With rule="published", batches of the
            estimation's loader times epochs.
        rule: "schedule", max(1, warm-up steps), a fraction rounded up; or "published", the fraction of `total_steps` as
            it is.

    Raises:
        ValueError: a rate that is not positive, negative warm-up, a fraction without total_steps, an unknown rule, or
            the published one without a fraction.
    """
    check_lr(lr)
    if warmup_steps < 0:
        raise ValueError(f"expected warmup_steps >= 0, got {warmup_steps!r}")
    if rule not in RULES:
        raise ValueError(f"expected rule to be one of {', '.join(RULES)}, got {rule!r}")
    if 0 < warmup_steps < 1 and total_steps is None:
        raise ValueError(f"warmup_steps={warmup_steps!r} is a share of the run: give total_steps too")
    if rule == "published":
        return lr / _published_steps(warmup_steps, total_steps)
    return lr / max(1.0, float(_warmup(warmup_steps, total_steps)))


def warmup_steps(share: float, total_steps: int) -> int:
    """Number of warm-up steps of a share in [0, 1) of the run: rounded up, as `TrainingArguments.get_warmup_steps`."""
    return math.ceil(share * total_steps)


def _warmup(steps: float, total_steps: int | None) -> float:
    return warmup_steps(steps, total_steps) if 0 < steps < 1 and total_steps is not None else steps


def _published_steps(share: float, batches: int | None) -> float:
    if not 0 < share < 1 or batches is None or not batches > 0:
        raise ValueError(
            "rule='published' divides by a share of the estimation's batches: give warmup_steps between 0 and 1 and "
            f"total_steps=len(loader) * epochs, got {share!r} and {batches!r}"
        )
    return share * batches
