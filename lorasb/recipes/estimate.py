"""What a run is about to do, and what that takes by two timed steps."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..utils.precision import DTYPES, native, slowdown
from .packing import row_length
from .prepare import Run, device
from .settings import Settings

LONG = 30 * 60  # seconds: a run that takes longer is told what costs most


@dataclass(frozen=True)
class Estimate:
    """Seconds of the training that is left, and the most bytes that the process holds."""

    seconds: float
    memory: int


def announcement(run: Run) -> str:
    """The line before training."""
    settings = run.settings
    rows = "rows" if settings.packing else "examples"
    where = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    return (
        f"Training on the {where} in {run.precision.name}: {run.steps:,} steps of {settings.batch_size} {rows}, "
        f"{run.tokens:,} tokens"
    )


def estimated(run: Run, estimate: Estimate) -> list[str]:
    """The announcement with the estimate, and for a long run the setting that costs most."""
    lines = [
        f"{announcement(run)}: about {duration(estimate.seconds)} and {estimate.memory / 1e9:.1f} GB, "
        "by the first steps"
    ]
    if estimate.seconds > LONG:
        name, saved = costliest(run, estimate.seconds)
        lines.append(f"That is long, and {name} would save about {duration(saved)} of it")
    return lines


def costliest(run: Run, seconds: float) -> tuple[str, float]:
    """The change of one setting that saves most, and the seconds that it saves."""
    settings, defaults = run.settings, Settings()
    found = [(f"{_fewer(settings)} (half of the steps)", seconds / 2)]
    name = run.precision.name
    if device() == "cpu" and name != "float32" and name != native().name:
        found.append(("--dtype auto (float32 here)", seconds * (1 - 1 / max(1.0, slowdown(DTYPES[name])))))
    if settings.epochs > 1:
        found.append(("--epochs 1", seconds * (1 - 1 / settings.epochs)))
    if settings.data is None and settings.train_examples > defaults.train_examples:
        share = defaults.train_examples / settings.train_examples
        found.append((f"--train-examples {defaults.train_examples}", seconds * (1 - share)))
    if settings.gradient_checkpointing:
        found.append(("--no-gradient-checkpointing", seconds / 4))  # a forward of what is two, and its backward
    lengths, half = [row_length(row) for row in run.rows], settings.max_length // 2
    short = sum(min(length, half) for length in lengths) / sum(lengths)
    found.append((f"--max-length {half}", seconds * (1 - short)))
    return max(found, key=lambda one: one[1])


def _fewer(settings: Settings) -> str:
    if settings.data is None:
        return f"--train-examples {max(1, settings.train_examples // 2)}"
    return f"--epochs {settings.epochs / 2:g}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """The most bytes that this process has held on its device."""
    if device() == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def estimate(times: list[tuple[float, int]], left: int, longest: int, memory: tuple[int, int]) -> Estimate:
    """From steps that were timed to those that are left.

    Args:
        times: of each timed step its seconds, and the tokens it computed, padding included.
        left: tokens of the steps that are left.
        longest: tokens of the largest step of all.
        memory: bytes held before the timed steps, and at most since then.
    """
    rate = min(seconds / max(1, tokens) for seconds, tokens in times)  # the first step has to load what others find
    before, peak = memory
    grown = max(0, peak - before) * longest / max(1, max(tokens for _, tokens in times))
    return Estimate(rate * left, int(max(peak, before + grown)))


def padded_tokens(rows: Sequence[int], lengths: Sequence[int], parts: int) -> int:
    """Tokens that a step's rows make in so many parts, each padded to its longest."""
    size = max(1, -(-len(rows) // parts))
    sizes = [lengths[i] for i in rows]
    return sum(len(part) * max(part) for part in (sizes[i : i + size] for i in range(0, len(sizes), size)))
