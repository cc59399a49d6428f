"""One basis for tasks that it was not made from: losses by basis, and whether the share it keeps predicts them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research import joint_basis
from benchmarks.research import people as compared
from benchmarks.research.reporting.markdown import read_json, table, where, where_rows
from benchmarks.research.shared_bases import SHARED, TRAINED
from benchmarks.research.unseen_tasks import (
    FILE,
    OWN,
    RANDOM,
    before,
    by_task,
    over_own,
    ranks_of,
    runs,
)

INTRODUCTION = """\
The bases are made from the first steps on some task families of reasoning-gym; the tasks below are other families.
SmolLM2-135M, 75 steps of 8, mean loss on 200 held-out examples, one seed unless a cell has more; every LoRA-SB run
uses the automatic rate. `own`: the default start on the task itself; `random`: random orthonormal factors. In
brackets: the share of the task's first step that the basis keeps (`lorasb basis fit`).
`python -m benchmarks.research.unseen_tasks --data-dir DATA` runs what is missing, `--table` counts it."""


def section(results: Path) -> list[str]:
    """Return a table per rank and the correlation, then the tasks that a basis was made from."""
    rows = read_csv(results / FILE)
    if not rows:
        return [*joint(results), *people(results)]
    out = ["## Tasks that a basis was not made from", "", INTRODUCTION, ""]
    for r in ranks_of(rows):
        head, *body = by_task(rows, r)
        out += [f"### r = {r}", "", *table(head, body), ""]
    head, *body = over_own(rows)
    out += ["### Loss relative to the task's own basis", "", *table(head, body), ""]
    return [*out, *_rates(rows), *_prediction(rows), where_rows(rows), "", *joint(results), *people(results)]


def joint(folder: Path) -> Iterator[str]:
    """Yield four tasks on one basis, and each on a separate basis."""
    if found := read_csv(folder / joint_basis.FILE):
        yield from ("### Four tasks on one basis", "")
        yield "SmolLM2-135M; 75 steps of 8; 200 held-out problems; both at the best rate for a separate basis (own)."
        yield "Losses and scores ± standard deviation over seeds, the difference ± its 95% interval; *kept*: share of"
        yield "the first step's energy that the joint basis keeps."
        yield ""
        yield from table(list(joint_basis.HEAD), joint_basis.lines(found))
        yield from ("", where_rows(found), "")


def people(folder: Path) -> Iterator[str]:
    """Yield many people on one basis, compared with each alone and one LoRA for all."""
    if found := read_json(folder / compared.FILE):
        yield from ("### Many people on one basis", "", where(found), "")
        yield "SmolLM2-135M; the people of `make demo-many`, each asked four questions in wordings not trained on;"
        yield "seconds are for the entire `lorasb finetune`, on a machine shared with other work."
        yield ""
        yield from table(list(compared.HEAD), compared.lines(found))
        yield ""


def _loss(found: Sequence[Row]) -> float:
    return statistics.fmean(float(row["loss"]) for row in found)


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    """Compare the automatic rate with its multiples, on families that were not used to choose anything."""
    factors = sorted({float(row["factor"]) for row in rows})
    swept = {(row["task"], row["basis"], row["r"]) for row in rows if row["factor"] != "1"}
    if not swept:
        return
    yield from ("### The automatic rate on these tasks", "")
    yield from ("Held-out loss at the automatic rate times each factor.", "")
    body = []
    for key in sorted(swept):
        found = [row for row in rows if (row["task"], row["basis"], row["r"]) == key]
        by_factor = {f: [row for row in found if float(row["factor"]) == f] for f in factors}
        body.append([*key, *(f"{_loss(at):.3f}" if at else "" for at in by_factor.values())])
    yield from (*table(["task", "basis", "r", *(f"{factor:g}x" for factor in factors)], body), "")


def _prediction(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the correlation of the share that a basis keeps with the gain in loss relative to the task's own basis."""
    pairs = []
    for row in rows:
        own = runs(rows, row["task"], OWN, int(row["r"]))
        of_first_steps = row["basis"] in (*SHARED, RANDOM) and row["basis"] != TRAINED
        if of_first_steps and own and row["factor"] == "1" and row["share"] != "None":
            start = before(rows, row["task"])
            pairs.append((float(row["share"]), (start - float(row["loss"])) / (start - _loss(own))))
    if len(pairs) > 2 and len({share for share, _ in pairs}) > 1:
        found = statistics.correlation(*zip(*pairs, strict=True))
        least = min(gain for _, gain in pairs)
        yield (
            f"Over {len(pairs)} runs on a random basis or one of first steps, the share of the task's first step that "
            "the basis keeps correlates with the gain in loss, relative to the gain on the task's own basis, with a "
            f"coefficient of {found:.2f}{_interval(found, len(pairs))}. The smallest gain is {least:.0%} of "
            "the gain on the own basis."
        )
        yield ""
    if kept := [float(row["share"]) for row in rows if row["basis"] == TRAINED]:
        low, high = f"{min(kept):.2%}", f"{max(kept):.2%}"
        yield from (f"A basis from a trained LoRA keeps {low} to {high} of first steps, which predicts nothing.", "")


def _interval(correlation: float, count: int) -> str:
    """Return the 95% interval by Fisher's z, as if runs were independent; nothing for three runs or fewer."""
    if count < 4 or abs(correlation) >= 1:
        return ""
    half = 1.96 / math.sqrt(count - 3)
    low, high = (math.tanh(math.atanh(correlation) + sign * half) for sign in (-1, 1))
    return f" (95% interval {low:.2f} to {high:.2f})"
