"""Starts and optimizers in pairs of runs, with the intervals of their differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research.methods.grid import LONGER, task_named
from benchmarks.research.paired.budget import COMPARED, HOURS, LONGER_RANK, bills
from benchmarks.research.paired.compare import difference, head, lines, machines, ranks_of, spots_of
from benchmarks.research.paired.decision import LEVEL, RIVALS, RULE, Standing, standings
from benchmarks.research.paired.grid import (
    FIXED,
    FOUND,
    LORA,
    MEASURED,
    RANKS,
    ROWS,
    SEEDS,
    TASKS,
    entries,
    shown_rate,
    sweep_of,
)
from benchmarks.research.paper import lasting
from benchmarks.research.reporting.charts import draw_by_parameters
from benchmarks.research.reporting.markdown import picture, table, where_rows

PLAIN = "sign"
PICTURE = "loss-by-parameters.png"
LORA_XS = "LoRA-XS", "LoRA-XS, output"  # by the side that Σ is on
INTRODUCTION = f"""\
Two entries of a task see the same batches in the same order, seed by seed, and are judged by loss on at least 1,000
held-out examples. `{PLAIN}` is the library as it is. Rates are chosen by one more seed on the validation split: three
around a rule's, then outward for as long as the best is the last one tried. Beside each mean stands the mean difference
of the same seeds, with the 95% interval of a paired t-test: a tie where the interval holds zero.
A letter says which machine ran an entry; the line below a table names it. `python -m benchmarks.research.paired
--data-dir DATA` runs what is missing; what has not been run is not in the tables, and *What the runs took* says how
much that is."""


def section(results: Path) -> list[str]:
    """All tasks that have rows, and how long subspaces last."""
    rows = read_csv(results / ROWS)
    parts = [part for task in (*TASKS, *LONGER) for part in one_task(rows, task)]
    out = ["## Starts and optimizers in pairs", "", INTRODUCTION, "", *parts] if parts else []
    shown = [*by_parameters(rows, results), *rates(rows), *sides(rows), *what_wins(rows), *what_runs_took(rows)]
    return [*out, *shown, *how_long(results)]


def one_task(rows: Sequence[Row], task: str) -> Iterator[str]:
    """A row a rank and entry."""
    name, size = f"{task} by loss", task_named(f"{task} by loss")
    body = list(lines(rows, name, PLAIN))
    if not body:
        return
    yield from (f"### {task}, by loss", "")
    chosen = f" Rates are those of {sweep_of(name)}." if sweep_of(name) != name else ""
    of_one = f"{size.model}; {size.steps} steps of {size.batch}; {size.test} examples; up to {len(SEEDS)} seeds."
    yield from (of_one + chosen, "")
    yield from table(head(PLAIN), body)
    against = [line for line in lines(rows, name, LORA) if line[-1]]
    if against:
        yield from ("", f"Against {LORA}:", "", *table(head(LORA), against))
    mine = [row for row in rows if row["task"] == name and row["split"] == "test"]
    yield from ("", where_rows(mine, machines(rows)), "")


def by_parameters(rows: Sequence[Row], results: Path) -> Iterator[str]:
    """Loss against trained parameters of all entries, in a picture and a table."""
    found = {task: spots for task in TASKS if len(spots := list(spots_of(rows, f"{task} by loss"))) > 1}
    shown = {task: spots for task, spots in found.items() if any(spot.name.startswith("LoRA r=") for spot in spots)}
    if not shown:
        return
    draw_by_parameters(shown, results / PICTURE)
    yield from ("### By trained parameters", "")
    yield (
        "Each method at its best rate of a sweep, as above: the mean held-out loss over the seeds that all have. "
        "PEFT's other adapters have their documented defaults but for what their name says; LoRA's scaling is 1."
    )
    yield from picture("Held-out loss against trained parameters", f"results/{PICTURE}")
    body = [
        [task, spot.name, str(spot.r), f"{spot.trained:,}", f"{spot.loss:.4f}", str(spot.seeds)]
        for task, spots in shown.items()
        for spot in sorted(spots, key=lambda one: one.trained)
    ]
    yield from table(["task", "entry", "r", "trained", "loss", "seeds"], body)
    yield ""


def rates(rows: Sequence[Row]) -> Iterator[str]:
    """The rates that are measured, and those that trials find, against a constant one and the best of a sweep."""
    yield from _rates(
        rows,
        MEASURED,
        '### Learning rates measured (`lr="auto"`)',
        f"The default start at the rate 2e-3 (`{FIXED}`, if it was run), at the rate that `lorasb finetune` measures "
        f"on the samples and refines by two trials of 4 steps (`{MEASURED}`), and at the best of a sweep of whole runs "
        f"(`{PLAIN}`).",
    )
    yield from _rates(
        rows,
        FOUND,
        "### Learning rates found by trials (`lorasb.find_lr`)",
        f"The default start at the rate 2e-3 (`{FIXED}`), at the rate that trials of 12 steps find from there on "
        f"the run's own first batches (`{FOUND}`), and at the best rate of a sweep of whole runs (`{PLAIN}`).",
    )


def _rates(rows: Sequence[Row], entry: str, title: str, text: str) -> Iterator[str]:
    """An entry that finds its own rate against the others, over the seeds that both have."""
    body = []
    for task in (*TASKS, *LONGER):
        for r in ranks_of(rows):
            fixed, swept = (difference(rows, f"{task} by loss", r, entry, other) for other in (FIXED, PLAIN))
            known = [one for one in (fixed, swept) if one is not None]
            if known:
                found = shown_rate(entries()[entry], r, rows, f"{task} by loss")
                at = [f"{one.base:.4f}" if one else "" for one in (fixed, swept)]
                line = [task, str(r), str(known[0].seeds), at[0], f"{known[0].base + known[0].mean:.4f}", found]
                body.append([*line, str(fixed or ""), at[1], str(swept or "")])
    if body:
        yield from (title, "", text, "")
        columns = ["task", "r", "seeds", "loss at 2e-3", "at the found rate", "found", "less that at 2e-3"]
        yield from table([*columns, "at the best of a sweep", "less that"], body)
        yield ""


def sides(rows: Sequence[Row]) -> Iterator[str]:
    """LoRA-XS with its Σ in A against Σ in B, over the seeds that both have."""
    body = []
    for task in TASKS:
        for r in ranks_of(rows):
            found = difference(rows, f"{task} by loss", r, *LORA_XS)
            if found is not None:
                rate = (shown_rate(entries()[name], r, rows, f"{task} by loss") for name in LORA_XS)
                losses = f"{found.base + found.mean:.4f}", f"{found.base:.4f}"
                body.append([task, str(r), str(found.seeds), *rate, *losses, str(found)])
    if body:
        yield from ("### Σ of LoRA-XS in A or in B", "")
        yield from (
            f"LoRA-XS's authors factor Wᵀ = UΣVᵀ and give UΣ to the input's side, A (`{LORA_XS[0]}` here, "
            f'`init="lora-xs"`); `{LORA_XS[1]}` (`"lora-xs-output"`) has Σ in B, as LoRA-XS has in *Methods side by '
            "side*. AdamW's steps of R differ between the two.",
            "",
        )
        columns = ["task", "r", "seeds", "rate, Σ in A", "Σ in B", "loss, Σ in A", "Σ in B", "less Σ in B"]
        yield from table(columns, body)
        yield ""


def what_wins(rows: Sequence[Row]) -> Iterator[str]:
    """How far each entry comes towards being the default."""
    found = list(standings(rows))
    if not found:
        return
    yield from ("### What wins", "", RULE, "")
    yield "Tasks and ranks on which an entry is better / tied / worse by the interval, of those that have been run:"
    yield ""
    body = [[one.entry, *(tally(one, other) for other in (*RIVALS, LORA)), str(one.level)] for one in found]
    yield from table(
        ["entry", *(f"against {name}" for name in (*RIVALS, LORA)), f"tasks within {LEVEL:.0%} of LoRA"], body
    )
    winners = [f"`{one.entry}`" for one in found if one.wins]
    yield ""
    if winners:
        yield f"The rule holds for {', '.join(winners)}."
    else:
        yield "The rule holds for none, so that the default stays as it is; what is better on some tasks is an option."
    yield from ("", *nearest(max(found, key=lambda one: one.lead)), "")


def nearest(one: Standing) -> Iterator[str]:
    """Every difference of the entry that comes nearest, with its interval; below zero is better."""
    apart = {(d.task, d.r, other): d for other, found in one.against.items() for d in found}
    others = (*RIVALS, LORA)
    body = [
        [task, str(r), *(str(apart.get((f"{task} by loss", r, other), "")) for other in others)]
        for task in TASKS
        for r in RANKS
        if any((f"{task} by loss", r, other) in apart for other in others)
    ]
    yield from (f"`{one.entry}` comes nearest. Its loss less that of each, with 95% intervals:", "")
    yield from table(["task", "r", *(f"less {other}" for other in others)], body)


def tally(one: Standing, other: str) -> str:
    """Better / tied / worse; nothing where none has been run."""
    counts = one.counts(other)
    lost = counts["worse"] + counts["diverged"]
    return f"{counts['better']} / {counts['tie']} / {lost}" if counts.total() else ""


def what_runs_took(rows: Sequence[Row]) -> Iterator[str]:
    """Core-hours by task, and those of the runs that are missing."""
    found = list(bills(rows)) if rows else []
    if not found:
        return
    used, rest = sum(one.hours for one in found), sum(one.rest for one in found)
    names = ", ".join(f"`{name}`" for name in COMPARED)
    yield from ("### What the runs took", "")
    yield from (
        f"All runs had {HOURS:.0f} hours of a core (eight of two). Those below took {used:.1f}; runs that were stopped "
        f"or repeated on another machine, are not in it. Eight seeds of {names} at r = {', '.join(map(str, RANKS))}, "
        f"and at r = {LONGER_RANK} for the longer runs, are about {rest:.0f} hours more at what a run took so far (a "
        "longer run that never ran: by its steps). So the runs went to what decides the rule first: ranks at which the "
        "tasks tell entries apart, all entries with few seeds, then finalists with eight.",
        "",
    )
    columns = ["task", "runs", "core-hours", "seconds a run", "runs missing", "core-hours they would take"]
    yield from table(
        columns,
        (
            [one.task, str(one.runs), f"{one.hours:.2f}", f"{one.seconds:.0f}", str(one.missing), f"{one.rest:.0f}"]
            for one in found
        ),
    )
    yield ""


def how_long(results: Path) -> Iterator[str]:
    """The energy that each start's subspace keeps over the steps of training."""
    found = read_csv(results / lasting.FILE)
    if not found:
        return
    yield from ("### How long a subspace holds the gradient (`lasting`)", "")
    yield from (
        "Subspaces are made at W0 from 32 samples; G is that of 32 others, before and during full fine-tuning of "
        "SmolLM2-135M; ‖UᵀGV‖²/‖G‖², all layers together.",
        "",
    )
    yield from table(list(lasting.HEAD), lasting.shown(found))
    yield from ("", where_rows(found))
    yield from picture("Energy of the gradient in each start's subspace, by steps of training", "results/lasting.png")
