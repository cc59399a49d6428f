"""The line before training, and the estimate of time and memory from a run's first steps."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from ..utils.precision import DTYPES, native, slowdown
from .prepare import Run, device
from .settings import Settings
from .tokenize import row_length

LONG_RUN = 30 * 60  # seconds; longer runs get a hint which setting costs most


@dataclass(frozen=True)
class Estimate:
    """Seconds of training that remain, and the process's peak memory in bytes."""

    seconds: float
    memory: int


def announcement(run: Run) -> str:
    """The line printed before training."""
    settings = run.settings
    rows = "rows" if settings.packing else "examples"
    where = torch.cuda.get_device_name() if device() == "cuda" else "CPU"
    if settings.rl is not None:
        prompts = settings.batch_size // settings.generations
        return (
            f"GRPO on the {where} in {run.precision.name}: {run.steps:,} steps of {prompts} prompts, "
            f"{settings.generations} completions each"
        )
    passes = "" if settings.epochs or run.epochs == 1 else f" ({run.epochs:g} passes, --epochs auto)"
    return (
        f"Training on the {where} in {run.precision.name}: {run.steps:,} steps of {settings.batch_size} {rows}"
        f"{passes}, {run.tokens:,} tokens"
    )


def estimated(run: Run, estimate: Estimate) -> list[str]:
    """The announcement with the estimate, and for a long run the setting whose change saves most."""
    lines = [
        f"{announcement(run)}: about {duration(estimate.seconds)} and {estimate.memory / 1e9:.1f} GB, "
        "by the first steps"
    ]
    if estimate.seconds > LONG_RUN:
        name, saved = costliest(run, estimate.seconds)
        lines.append(f"That is long, and {name} would save about {duration(saved)} of it")
    return lines


def costliest(run: Run, seconds: float) -> tuple[str, float]:
    """The change of one setting that saves most time, and the seconds that it saves."""
    settings, defaults = run.settings, Settings()
    options = [(f"{_fewer(run)} (half of the steps)", seconds / 2)]
    name = run.precision.name
    if device() == "cpu" and name != "float32" and name != native().name:
        options.append(("--dtype auto (float32 here)", seconds * (1 - 1 / max(1.0, slowdown(DTYPES[name])))))
    if run.epochs > 1:
        options.append(("--epochs 1", seconds * (1 - 1 / run.epochs)))
    if settings.data is None and settings.train_examples > defaults.train_examples:
        fraction_of_examples = defaults.train_examples / settings.train_examples
        options.append((f"--train-examples {defaults.train_examples}", seconds * (1 - fraction_of_examples)))
    if settings.gradient_checkpointing:
        # Two forwards and a backward, which costs about two forwards, instead of one and a backward.
        options.append(("--no-gradient-checkpointing", seconds / 4))
    # Time is taken as proportional to tokens, which ignores that attention is quadratic in the length.
    lengths, half = [row_length(row) for row in run.rows], settings.max_length // 2
    fraction = sum(min(length, half) for length in lengths) / sum(lengths)
    options.append((f"--max-length {half}", seconds * (1 - fraction)))
    return max(options, key=lambda option: option[1])


def _fewer(run: Run) -> str:
    if run.settings.data is None:
        return f"--train-examples {max(1, run.settings.train_examples // 2)}"
    return f"--epochs {run.epochs / 2:g}"


def duration(seconds: float) -> str:
    """Seconds as readable text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """The process's peak memory in bytes: allocated by torch on a GPU, resident on the CPU."""
    if device() == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # ru_maxrss is in KiB on Linux
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def memory_in_use() -> int:
    """The process's memory in bytes now, as `peak_memory` counts it; on a GPU the peak counts from here."""
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    return min(psutil.Process().memory_info().rss, peak_memory())


def estimate(
    times: list[tuple[float, int]], left: int, longest: int, memory: tuple[int, int], peak_before: int = 0
) -> Estimate:
    """Extrapolate from timed steps to the remaining ones."""
    warm = times[1:] or times  # the first step also loads libraries and allocates memory
    rate = sum(seconds for seconds, _ in warm) / max(1, sum(tokens for _, tokens in warm))
    before, peak = memory
    # Activations grow with the tokens of a step; weights and optimizer state are in `before` and in the peak.
    grown = max(0, peak - before) * longest / max(1, max(tokens for _, tokens in times)) if peak > peak_before else 0
    return Estimate(rate * left, int(max(peak, before + grown)))


def padded_tokens(rows: Sequence[int], lengths: Sequence[int], parts: int) -> int:
    """Tokens with padding of a step's rows in `parts` micro-batches, each padded to its longest row."""
    size = max(1, -(-len(rows) // parts))  # rows per micro-batch, rounded up
    sizes = [lengths[i] for i in rows]
    micro_batches = (sizes[i : i + size] for i in range(0, len(sizes), size))
    return sum(len(micro_batch) * max(micro_batch) for micro_batch in micro_batches)
