"""Core-hours that the runs took, and what the rest of the grid would take at the same cost a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.csv_files import Row
from benchmarks.research.methods.grid import LONGER, task_named
from benchmarks.research.paired.compare import final_losses
from benchmarks.research.paired.decision import RIVALS
from benchmarks.research.paired.grid import LORA, RANKS, SEEDS, TASKS, Entry, entries, rates_to_try, swept

COMPARED = ("sign", *RIVALS, "per-sample", LORA)  # the rule's entries, and the start that comes nearest to it
LONGER_RANK = 16


@dataclass(frozen=True)
class Bill:
    """One task's runs. `seconds` is a run's mean, scaled by the number of steps from the shorter task where none of
    these steps has run."""

    task: str
    runs: int
    hours: float
    seconds: float
    missing: int

    @property
    def rest(self) -> float:
        """Core-hours of the runs that are missing."""
        return self.missing * self.seconds / 3600


def bills(rows: Sequence[Row]) -> Iterator[Bill]:
    """Every task at every rank, then the longer runs at one; none of a task whose runs' cost nothing tells."""
    for task in (*TASKS, *LONGER):
        took = _seconds(rows, task)
        a_run = statistics.fmean(took) if took else _scaled(rows, task)
        if a_run is not None:
            yield Bill(task, len(took), sum(took) / 3600, a_run, missing(rows, task))


def missing(rows: Sequence[Row], task: str) -> int:
    """Runs that `COMPARED` lack for all seeds, and for the least sweep that is left."""
    ranks = (LONGER_RANK,) if task in LONGER else RANKS
    pairs = {(name, entries()[name].rank(r)) for name in COMPARED for r in ranks}
    return sum(_missing(rows, f"{task} by loss", entries()[name], r, task in LONGER) for name, r in pairs)


def _missing(rows: Sequence[Row], task: str, entry: Entry, r: int, longer: bool) -> int:
    sweep = 0 if longer else len(rates_to_try(entry, r, swept(rows, task, entry.name, r)))
    return sweep + len(SEEDS) - len(final_losses(rows, task, entry.name, r))


def _seconds(rows: Sequence[Row], task: str) -> list[float]:
    return [float(row["seconds"]) for row in rows if row["task"] == f"{task} by loss"]


def _scaled(rows: Sequence[Row], task: str) -> float | None:
    """A longer run's seconds, from the short ones' and both numbers of steps; None where no short one ran."""
    base = LONGER.get(task, (task,))[0]
    took = _seconds(rows, base)
    if not took:
        return None
    return statistics.fmean(took) * task_named(f"{task} by loss").steps / task_named(f"{base} by loss").steps
