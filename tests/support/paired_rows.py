"""Rows of pairs of runs, as benchmarks.research.paired writes them."""

from __future__ import annotations

from benchmarks.research.paired import grid
from benchmarks.research.paired.grid import entries

TASK = "chain_sum by loss"


def row(entry: str, r: int, lr: float, seed: int, loss: float, split: str = "test") -> dict[str, str]:
    values = {
        "task": TASK,
        "variant": entry,
        "r": r,
        "lr": lr,
        "seed": seed,
        "loss": loss,
        "split": split,
        "found_lr": "",
        "seconds": 90.0,
        "machine": "a machine",
        "adapter_params": 256,
    }
    return {name: str(value) for name, value in values.items()}


def swept(entry: str, r: int, best: int = 0) -> list[dict[str, str]]:
    """Three rates and, where the best is an end, two more."""
    one = entries()[entry]
    powers = (-1, 0, 1) if best == 0 else (-1, 0, 1, 2 * best)
    losses = {power: 0.3 + 0.01 * abs(power - best) for power in powers}
    return [row(entry, r, one.at(r, p), grid.SWEEP_SEED, loss, "validation") for p, loss in losses.items()]
