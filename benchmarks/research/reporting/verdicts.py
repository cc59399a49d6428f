"""Verdicts of the grid on the paper's ordering, from means and deviations of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.csv_files import Row
from benchmarks.research.methods.grid import CORE, METHODS, SEEDS, TASKS
from benchmarks.research.methods.tables import Line
from benchmarks.research.methods.tables import lines as all_lines

SMALLEST = 0.01  # smallest difference of scores that counts: two answers of 200


@dataclass(frozen=True)
class Verdict:
    """Comparison of LoRA-SB with another method on one task.

    Attributes:
        measure: "score" or "loss".
        gain: how much better LoRA-SB's mean is; positive is better whatever the measure.
        deviation: standard deviation of the difference of two runs, sqrt(sd² + sd²).
        trained: LoRA-SB's trained parameters divided by the other's.
    """

    task: str
    ours: Line
    theirs: Line
    measure: str
    gain: float
    deviation: float
    trained: float

    @property
    def word(self) -> str:
        """ "better" or "worse"; "level" within one standard deviation of the difference, or below `SMALLEST`."""
        is_score = self.measure == "score" and TASKS[self.task].higher_is_better
        if abs(self.gain) <= max(self.deviation, SMALLEST if is_score else 0.0):
            return "level"
        return "better" if self.gain > 0 else "worse"


def lines(rows: Sequence[Row], task: str) -> list[Line]:
    """Return the methods for which all seeds have run: one seed has no deviation."""
    return [line for line in all_lines(rows, task) if len(line.scores) == len(SEEDS)]


def compare(task: str, ours: Line, theirs: Line, measure: str) -> Verdict:
    """Compare two methods by one measure."""
    (mine, sd), (other, other_sd) = getattr(ours, measure), getattr(theirs, measure)
    sign = 1 if measure == "score" and TASKS[task].higher_is_better else -1
    return Verdict(
        task, ours, theirs, measure, sign * (mine - other), math.hypot(sd, other_sd), ours.params / theirs.params
    )


def against_xs(rows: Sequence[Row], task: str, method: str = "LoRA-SB") -> list[Verdict]:
    """Compare LoRA-SB with LoRA-XS at equal r, by score and by loss."""
    found = {(line.method, line.r): line for line in lines(rows, task)}
    measures = ("score", "loss") if TASKS[task].higher_is_better else ("loss",)
    return [
        compare(task, found[method, r], found["LoRA-XS", r], measure)
        for r in TASKS[task].ranks
        for measure in measures
        if (method, r) in found and ("LoRA-XS", r) in found
    ]


def against_others(rows: Sequence[Row], task: str, method: str = "LoRA-SB") -> list[Verdict]:
    """Compare LoRA-SB with all that train more, by the task's measure: LoRA at every r, others at the largest."""
    found = {(line.method, line.r): line for line in lines(rows, task)}
    others = [line for (name, _), line in found.items() if METHODS[name].family != CORE]
    return [
        compare(task, found[method, r], line, "score")
        for line in others
        for r in TASKS[task].ranks
        if (method, r) in found and (line.method == "LoRA" or r == TASKS[task].ranks[-1])
    ]


def against_lora(rows: Sequence[Row]) -> list[Verdict]:
    """Compare LoRA-SB at its largest rank with LoRA, on every task that both have run."""
    return [
        verdict
        for task, of in TASKS.items()
        for verdict in against_others(rows, task)
        if verdict.theirs.method == "LoRA" and verdict.ours.r == of.ranks[-1]
    ]
