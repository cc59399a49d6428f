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
    """Loss of an entry less that of another, at the same rank and seeds: below zero is better.

    Attributes:
        mean: over seeds. half: half the width of the 95% interval; infinite for one seed.
        seeds: how many. base: mean loss of the other.
    """

    mean: float
    half: float
    seeds: int
    base: float

    @property
    def verdict(self) -> str:
        """By the interval: "better", "worse", or "tie" if it contains zero; "diverged" if the entry's loss is not
        finite, and "better" if only the other's is not."""
        if math.isnan(self.mean) or self.mean == math.inf:
            return "diverged"
        if self.mean == -math.inf:
            return "better"
        if self.mean + self.half < 0:
            return "better"
        return "worse" if self.mean - self.half > 0 else "tie"

    def __str__(self) -> str:
        if self.seeds == 1 and math.isfinite(self.mean):
            return f"{self.mean:+.4f} (one seed)"
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
    """Compare over shared seeds; None if there are none. `other` may have a fixed rank."""
    mine, theirs = (final_losses(rows, task, name, entries()[name].rank(r)) for name in (entry, other))
    shared = sorted(mine.keys() & theirs.keys())
    if not shared:
        return None
    pairs = [mine[seed] - theirs[seed] for seed in shared]
    base = statistics.fmean(theirs[seed] for seed in shared)
    return Difference(statistics.fmean(pairs), half_width(pairs), len(shared), base)


def half_width(pairs: Sequence[float]) -> float:
    """Half the 95% interval of a mean, of differences or of losses."""
    freedom = len(pairs) - 1
    if freedom == 0 or not all(map(math.isfinite, pairs)):
        return math.inf
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom
    return t * statistics.stdev(pairs) / math.sqrt(len(pairs))


def head(other: str) -> list[str]:
    """Return the header of the table that `lines` fills."""
    return ["r", "entry", "rate", "seeds", "machine", "trained", "loss", f"difference from {other}"]


def machines(rows: Sequence[Row]) -> dict[str, str]:
    """A letter for every machine, the same in all tables of these rows."""
    return dict(zip(sorted({row["machine"] for row in rows}), string.ascii_uppercase, strict=False))


def lines(rows: Sequence[Row], task: str, other: str) -> Iterator[list[str]]:
    """A row a rank and entry (in the task's own setting) that has test runs: the letters of the machines that ran them,
    its mean loss, and the difference to `other` over the same seeds."""
    letters = machines(rows)
    for r in ranks_of(rows):
        for name, entry in entries().items():
            runs = finals(rows, task, name, r)
            if runs and entry.rank(r) == r and not entry.setting:
                found = difference(rows, task, r, name, other) if name != other else None
                losses = losses_of(runs)
                where = " ".join(sorted({letters[row["machine"]] for row in runs}))
                rate, trained = shown_rate(entry, r, rows, task), runs[0]["adapter_params"]
                yield [str(r), name, rate, str(len(losses)), where, trained, shown_loss(losses), str(found or "")]


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """All ranks that have runs."""
    return sorted({int(row["r"]) for row in rows})


STARTS = ("sign", "per-sample")
APART = 3  # a run went wrong above this multiple of the median over its entry's seeds


@dataclass(frozen=True)
class Spot:
    """An entry's losses on a task, and how many parameters it trains.

    Attributes:
        losses: by seed. left_out: those above `APART` times the median, which the mean does not count.
    """

    name: str
    r: int
    trained: int
    losses: dict[int, float]
    left_out: dict[int, float]

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.losses.values())

    @property
    def half(self) -> float:
        """Half the 95% interval of the mean; infinite for one seed."""
        return half_width(list(self.losses.values()))

    @property
    def bar(self) -> float:
        """Half the error bar: the interval, the range for two seeds, and zero for one."""
        low, high = min(self.losses.values()), max(self.losses.values())
        return self.half if len(self.losses) > 2 else (high - low) / 2

    def __str__(self) -> str:
        half = f" ± {self.half:.4f}" if len(self.losses) > 1 else ""
        return f"{self.loss:.4f}{half}{_named(self.left_out)}"


def spots_of(rows: Sequence[Row], task: str) -> Iterator[Spot]:
    """The library's starts, LoRA-XS and PEFT's adapters that have test runs at the best rate of a sweep."""
    for name, entry in entries().items():
        for r in [entry.only] if entry.only and entry.swept else ranks_of(rows) if name in (*STARTS, "LoRA-XS") else []:
            if runs := finals(rows, task, name, r):
                kept, left_out = split_apart(losses_of(runs))
                if kept:
                    yield Spot(name, r, int(runs[0]["adapter_params"]), kept, left_out)


def split_apart(losses: dict[int, float]) -> tuple[dict[int, float], dict[int, float]]:
    """Losses by seed, and those that are above `APART` times the median or not finite."""
    most = APART * statistics.median(losses.values())
    kept = {seed: loss for seed, loss in losses.items() if loss <= most and math.isfinite(loss)}
    return kept, {seed: loss for seed, loss in sorted(losses.items()) if seed not in kept}


def shown_loss(losses: dict[int, float]) -> str:
    """The mean over all seeds, and those far above the others."""
    return f"{statistics.fmean(losses.values()):.4f}{_named(split_apart(losses)[1])}"


def _named(losses: dict[int, float]) -> str:
    """Losses in brackets, with their seeds; nothing where there are none."""
    return f" ({', '.join(f'seed {seed}: {loss:.4f}' for seed, loss in losses.items())})" if losses else ""
