"""What would make an entry the library's default, and how far each comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.csv_files import Row
from benchmarks.research.paired.compare import Difference, difference
from benchmarks.research.paired.grid import FIXED, LORA, RANKS, TASKS, entries

RIVALS = (FIXED, "LoRA-XS", "LoRA-XS, output", "random")  # a constant rate, W's subspace and random ones
TASKS_TO_WIN, RANKS_TO_WIN, LEVEL_TASKS = 3, 2, 2
LEVEL = 0.02  # of LoRA's loss: an interval inside of it is level with LoRA
RULE = (
    f"An entry becomes the default if it is better than each of {', '.join(f'`{name}`' for name in RIVALS)} at the "
    f"same rank on {TASKS_TO_WIN} tasks at {RANKS_TO_WIN} ranks, nowhere worse than any of them, and if on "
    f"{LEVEL_TASKS} tasks, at some rank, the whole interval of its loss is at most {LEVEL:.0%} above the loss of "
    f"`{LORA}`. What was not run, or with one seed only, does not count; a loss that is not finite is worse than one "
    "that is."
)


@dataclass(frozen=True)
class Standing:
    """One entry against its rivals and LoRA, over all tasks and ranks that both have run."""

    entry: str
    against: dict[str, list[Difference]]

    def counts(self, other: str) -> Counter[str]:
        """How often it is better, worse or a tie."""
        return Counter(found.verdict for found in self.against[other])

    @property
    def lead(self) -> int:
        """How many more differences to rivals are better than worse."""
        counts = sum((self.counts(name) for name in RIVALS), Counter[str]())
        return counts["better"] - counts["worse"] - counts["diverged"]

    @property
    def level(self) -> int:
        """Tasks on which it is level with LoRA at some rank."""
        return len({found.task for found in self.against[LORA] if is_level(found)})

    @property
    def wins(self) -> bool:
        """Whether `RULE` holds."""
        rivals = [found for name in RIVALS for found in self.against[name]]
        if any(found.verdict in ("worse", "diverged") for found in rivals):
            return False
        won = [len(self._tasks_won(r)) >= TASKS_TO_WIN for r in RANKS]
        return sum(won) >= RANKS_TO_WIN and self.level >= LEVEL_TASKS

    def _tasks_won(self, r: int) -> set[str]:
        """Tasks on which it is better than every rival at a rank."""
        better = (
            {found.task for found in self.against[name] if found.r == r and found.verdict == "better"}
            for name in RIVALS
        )
        return set.intersection(*better)


def is_level(found: Difference) -> bool:
    """Whether the interval is within `LEVEL` of the other's loss, or below."""
    return found.mean + found.half <= LEVEL * found.base


def standings(rows: Sequence[Row]) -> Iterator[Standing]:
    """Every entry that has run against some rival."""
    for name in entries():
        if name in (LORA, *RIVALS):
            continue
        against = {other: list(_differences(rows, name, other)) for other in (*RIVALS, LORA)}
        if any(against.values()):
            yield Standing(name, against)


def _differences(rows: Sequence[Row], entry: str, other: str) -> Iterator[Difference]:
    for task in TASKS:
        for r in RANKS:
            found = difference(rows, f"{task} by loss", r, entry, other)
            if found is not None and found.seeds > 1:
                yield found
