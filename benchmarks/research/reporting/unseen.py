"""One basis for tasks that it was not made from: losses by basis, and whether what it keeps predicts them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research.reporting.markdown import table, where_rows
from benchmarks.research.unseen_tasks import ARC, FILE, KINDS, LORA, NONE, OWN, RANDOM, SHARED, UNSEEN, cell

INTRODUCTION = """\
Bases are made from the first steps of families of reasoning-gym; the tasks here are other families. SmolLM2-135M, 75
steps of 8, mean loss on 200 held-out examples; every run of LoRA-SB takes the automatic rate. `own`: the default start
on the task itself; `random`: orthonormal factors that know nothing. In brackets: what the basis keeps of the task's
first step (`lorasb basis fit`). `python -m benchmarks.research.unseen_tasks --data-dir DATA` runs what is missing."""


def section(results: Path) -> list[str]:
    """A table per rank, and the correlation."""
    rows = read_csv(results / FILE)
    if not rows:
        return []
    out = ["## Tasks that a basis was not made from", "", INTRODUCTION, ""]
    for r in sorted({int(row["r"]) for row in rows if row["basis"] not in (LORA, NONE)}):
        out += [f"### r = {r}", "", *_by_task(rows, r), ""]
    return [*out, *_rates(rows), *_prediction(rows), where_rows(rows), ""]


def _at(rows: Sequence[Row], task: str, kind: str, r: int) -> list[Row]:
    """Runs of a task on a basis at the automatic rate; LoRA and the base have one rank."""
    rank = 1 if kind in (LORA, NONE) else r
    wanted = task, kind, str(rank), "1"
    return [row for row in rows if (row["task"], row["basis"], row["r"], row["factor"]) == wanted]


def _loss(found: Sequence[Row]) -> float:
    return statistics.fmean(float(row["loss"]) for row in found)


def _by_task(rows: Sequence[Row], r: int) -> list[str]:
    order = (NONE, OWN, *SHARED, *(kind for kind in KINDS if kind not in (NONE, OWN, *SHARED)))
    kinds = [kind for kind in order if any(_at(rows, task, kind, r) for task in (*UNSEEN, ARC))]
    body = []
    for task in (*UNSEEN, ARC):
        found = [_at(rows, task, kind, r) for kind in kinds]
        if _at(rows, task, OWN, r):
            body.append([task, *map(cell, found)])
    return table(["task", *kinds], body)


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    """The automatic rate against its multiples, on families that nothing was chosen on."""
    factors = sorted({float(row["factor"]) for row in rows})
    swept = {(row["task"], row["r"]) for row in rows if row["factor"] != "1"}
    if not swept:
        return
    yield from ("### The automatic rate on these tasks", "")
    yield from ("The default start at the automatic rate times each factor: the held-out loss.", "")
    body = []
    for task, r in sorted(swept, key=lambda key: (key[0], int(key[1]))):
        losses = {
            float(row["factor"]): float(row["loss"])
            for row in rows
            if (row["task"], row["r"], row["basis"]) == (task, r, OWN)
        }
        body.append([task, r, *(f"{losses[f]:.3f}" if f in losses else "" for f in factors)])
    yield from (*table(["task", "r", *(f"x{factor:g}" for factor in factors)], body), "")


def _prediction(rows: Sequence[Row]) -> Iterator[str]:
    """Correlation of what a basis keeps with the loss relative to a basis of the task's own."""
    pairs = []
    for row in rows:
        own, base = _at(rows, row["task"], OWN, int(row["r"])), _at(rows, row["task"], NONE, 1)
        if row["basis"] in (*SHARED, RANDOM) and own and base and row["factor"] == "1" and row["share"] != "None":
            gained = _loss(base) - float(row["loss"])
            pairs.append((float(row["share"]), gained / (_loss(base) - _loss(own))))
    if len(pairs) > 2 and len({share for share, _ in pairs}) > 1:
        found = statistics.correlation(*zip(*pairs, strict=True))
        least = min(gain for _, gain in pairs)
        yield (
            f"Over {len(pairs)} runs on a shared or a random basis, the share of the first step that is kept and the "
            f"share of the own basis's gain over the base correlate with {found:.2f}; the least gain is {least:.0%} of "
            "the own basis's."
        )
        yield ""
