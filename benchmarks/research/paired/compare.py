"""Two entries over the same seeds: the mean difference of their losses, with the interval of a paired t-test."""

from __future__ import annotations

import math
import statistics
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.csv_files import Row
from benchmarks.research.paired.grid import best_rate, entries, rows_of, shown_rate, swept

# two-sided 95% quantiles of Student's t, by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """Loss of `entry` less that of `other`, at the same rank and seeds: below zero is better.

    Attributes:
        mean: over seeds. half: half the width of the 95% interval; infinite for one seed.
        seeds: how many. base: mean loss of `other`.
    """

    task: str
    r: int
    entry: str
    other: str
    mean: float
    half: float
    seeds: int
    base: float

    @property
    def verdict(self) -> str:
        """By the interval: "better", "worse", or "tie" where it holds zero; "diverged" where the entry's loss is not
        finite, and "better" where only the other's is not."""
        if math.isnan(self.mean) or self.mean == math.inf:
            return "diverged"
        if self.mean == -math.inf:
            return "better"
        if self.mean + self.half < 0:
            return "better"
        return "worse" if self.mean - self.half > 0 else "tie"

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f} ({self.verdict})"


def finals(rows: Sequence[Row], task: str, entry: str, r: int) -> list[Row]:
    """The runs on the test split at the best rate of the sweep, one a seed."""
    rate = best_rate(entries()[entry], r, swept(rows, task, entry, r))
    return [row for row in rows_of(rows, task, entry, r, "test") if float(row["lr"]) == rate]


def final_losses(rows: Sequence[Row], task: str, entry: str, r: int) -> dict[int, float]:
    """Test loss by seed, at the best rate of the sweep."""
    return losses_of(finals(rows, task, entry, r))


def losses_of(runs: Sequence[Row]) -> dict[int, float]:
    """Loss by seed; infinite where it is not finite."""
    losses = {int(row["seed"]): float(row["loss"]) for row in runs}
    return {seed: loss if math.isfinite(loss) else math.inf for seed, loss in losses.items()}


def difference(rows: Sequence[Row], task: str, r: int, entry: str, other: str) -> Difference | None:
    """Of the seeds that both have; None where there are none. `other` may have a rank of its own."""
    mine, theirs = (final_losses(rows, task, name, entries()[name].rank(r)) for name in (entry, other))
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return None
    pairs = [mine[seed] - theirs[seed] for seed in shared]
    base = statistics.fmean(theirs[seed] for seed in shared)
    return Difference(task, r, entry, other, statistics.fmean(pairs), half_width(pairs), len(shared), base)


def half_width(pairs: Sequence[float]) -> float:
    """Half the 95% interval of the mean of differences."""
    freedom = len(pairs) - 1
    if freedom == 0 or not all(map(math.isfinite, pairs)):
        return math.inf
    return T95[min(freedom, len(T95)) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))


def head(other: str) -> list[str]:
    """Of the table that `lines` has the body of."""
    return ["r", "entry", "rate", "seeds", "machine", "trained", "loss", f"less {other}"]


def machines(rows: Sequence[Row]) -> dict[str, str]:
    """A letter for every machine, the same in all tables of these rows."""
    return dict(zip(sorted({row["machine"] for row in rows}), string.ascii_uppercase, strict=False))


def lines(rows: Sequence[Row], task: str, other: str) -> Iterator[list[str]]:
    """A row a rank and entry that has test runs: the letters of the machines that ran them, its mean loss, and the
    difference to `other` over the same seeds."""
    letters = machines(rows)
    for r in ranks_of(rows):
        for name, entry in entries().items():
            runs = finals(rows, task, name, r)
            if runs and entry.rank(r) == r:
                found = difference(rows, task, r, name, other) if name != other else None
                losses = losses_of(runs)
                where = " ".join(sorted({letters[row["machine"]] for row in runs}))
                rate, trained = shown_rate(entry, r, rows, task), runs[0]["adapter_params"]
                yield [str(r), name, rate, str(len(losses)), where, trained, shown_loss(losses), str(found or "")]


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """All ranks that have runs."""
    return sorted({int(row["r"]) for row in rows})


STARTS = ("sign", "per-sample")


@dataclass(frozen=True)
class Spot:
    """An entry's mean loss on a task, over the seeds that all entries have, and how many parameters it trains."""

    name: str
    r: int
    trained: int
    loss: float
    seeds: int


def spots_of(rows: Sequence[Row], task: str) -> Iterator[Spot]:
    """The library's starts, LoRA-XS and PEFT's adapters that have test runs at the best rate of a sweep."""
    found = {
        (name, r): runs
        for name, entry in entries().items()
        if entry.only or name in (*STARTS, "LoRA-XS")
        for r in ([entry.only] if entry.only else ranks_of(rows))
        if (runs := finals(rows, task, name, r))
    }
    losses = {key: losses_of(runs) for key, runs in found.items()}
    shared = set.intersection(*map(set, losses.values())) if losses else set()
    for (name, r), runs in found.items():
        mean = statistics.fmean(losses[name, r][seed] for seed in shared) if shared else math.inf
        if math.isfinite(mean):
            yield Spot(name, r, int(runs[0]["adapter_params"]), mean, len(shared))


def shown_loss(losses: dict[int, float]) -> str:
    """The mean over seeds, and those that ended at more than three times the median."""
    most = 3 * statistics.median(losses.values())
    apart = [f"seed {seed}: {loss:.4f}" for seed, loss in sorted(losses.items()) if loss > most]
    return f"{statistics.fmean(losses.values()):.4f}" + (f" ({', '.join(apart)})" if apart else "")
