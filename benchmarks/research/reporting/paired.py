"""Starts and optimizers in paired runs, with confidence intervals of their differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research.methods.grid import LONGER, task_named
from benchmarks.research.paired.compare import APART, Spot, difference, head, lines, machines, ranks_of, spots_of
from benchmarks.research.paired.grid import (
    FIXED,
    FOUND,
    LORA,
    MEASURED,
    PLAIN,
    ROWS,
    SEEDS,
    SETTINGS,
    TASKS,
    UNTUNED,
    entries,
    shown_rate,
    sweep_of,
)
from benchmarks.research.paper import lasting
from benchmarks.research.reporting.charts import draw_by_parameters
from benchmarks.research.reporting.markdown import picture, table, where_rows

PICTURE = "loss-by-parameters.png"
LORA_XS = "LoRA-XS", "LoRA-XS, output"  # with Σ in A, and in B
INTRODUCTION = f"""\
For each seed, all entries of a task see the same batches in the same order, and are compared by loss on at least 1,000
held-out examples. `{PLAIN}` is LoRA-SB's default start. Rates are chosen with one more seed on the validation split:
three around a rule's, then more for as long as the best one is at an end of those tried. Next to each mean is the mean
difference over the same seeds, with the 95% interval of a paired t-test: a tie if the interval contains zero. A letter
marks the machine that ran an entry; the line below a table names it. `python -m benchmarks.research.paired --data-dir
DATA` runs what is missing, and with `--table` counts it; the tables show only completed runs."""


def section(results: Path) -> list[str]:
    """Return the section with all tasks that have rows, and how long subspaces last."""
    rows = read_csv(results / ROWS)
    parts = [part for task in (*TASKS, *LONGER) for part in one_task(rows, task)]
    out = ["## Starts and optimizers in pairs", "", INTRODUCTION, "", *parts] if parts else []
    return [*out, *by_parameters(rows, results), *rates(rows), *sides(rows), *how_long(results)]


def one_task(rows: Sequence[Row], task: str) -> Iterator[str]:
    """Yield a task's tables, with one row per rank and entry."""
    name, size = f"{task} by loss", task_named(f"{task} by loss")
    body = list(lines(rows, name, PLAIN))
    if not body:
        return
    yield from (f"### {task}, by loss", "")
    chosen = f" Rates are from the sweep of {sweep_of(name)}." if sweep_of(name) != name else ""
    of_one = f"{size.model}; {size.steps} steps of {size.batch}; {size.test} examples; up to {len(SEEDS)} seeds."
    yield from (of_one + chosen, "")
    yield from table(head(PLAIN), body, left=2)
    against = [line for line in lines(rows, name, LORA) if line[-1]]
    if against:
        yield from ("", f"Against {LORA}:", "", *table(head(LORA), against, left=2))
    mine = [row for row in rows if row["task"] == name and row["split"] == "test"]
    yield from ("", where_rows(mine, machines(rows)), "")


def by_parameters(rows: Sequence[Row], results: Path) -> Iterator[str]:
    """Yield a picture and a table of all entries' loss against trained parameters."""
    found = {task: spots for task in TASKS if len(spots := list(spots_of(rows, f"{task} by loss"))) > 1}
    shown = {task: spots for task, spots in found.items() if any(spot.name.startswith("LoRA r=") for spot in spots)}
    if not shown:
        return
    draw_by_parameters(shown, results / PICTURE)
    yield from ("### By trained parameters", "")
    yield (
        "Each method at the best rate of its sweep, as above: the mean held-out loss over its own seeds, and the 95% "
        "interval of that mean by Student's t, which is wide for two seeds. The bars in the picture are these "
        "intervals; for two seeds they span both (hollow marks). Marks of entries with equal numbers of parameters "
        "are drawn side by side. Compare entries with different seeds by the last column, or by the paired "
        f"differences above. A seed with a loss above {APART} times the median of its entry is left out and named. "
        "PEFT's other adapters have their documented defaults except for what their names say; LoRA's scaling is 1."
    )
    yield from picture("Held-out loss against trained parameters", PICTURE)
    columns = ["task", "entry", "r", "trained", "loss (95% interval)", "seeds", "loss on the seeds that all have (n)"]
    body = (line for task, spots in shown.items() for line in _by_parameters(task, spots))
    yield from table(columns, body, left=2)
    yield ""


def _by_parameters(task: str, spots: Sequence[Spot]) -> Iterator[list[str]]:
    """Yield one row per entry and rank, the smallest first."""
    common = set.intersection(*(set(spot.losses) for spot in spots))
    for spot in sorted(spots, key=lambda one: one.trained):
        seeds = [spot.losses[seed] for seed in sorted(common)]
        same = f"{statistics.fmean(seeds):.4f} ({len(seeds)})" if seeds else ""
        yield [task, spot.name, str(spot.r), f"{spot.trained:,}", str(spot), str(len(spot.losses)), same]


def rates(rows: Sequence[Row]) -> Iterator[str]:
    """Compare measured rates, and rates found by trials, with a constant rate and the best of a sweep."""
    yield from _rates(
        rows,
        MEASURED,
        '### Learning rates measured (`lr="auto"`)',
        f"The default start at the constant rate 2e-3 (`{FIXED}`, if it was run), at the rate that `lorasb finetune` "
        f"measures on the samples and refines with two trials of 4 steps (`{MEASURED}`), and at the best rate of a "
        f"sweep of complete runs (`{PLAIN}`).",
    )
    yield from _rates(
        rows,
        FOUND,
        "### Learning rates found by trials (`lorasb.find_lr`)",
        f"The default start at the constant rate 2e-3 (`{FIXED}`), at the rate that trials of 12 steps on the run's "
        f"first batches find from there (`{FOUND}`), and at the best rate of a sweep of complete runs (`{PLAIN}`).",
    )
    yield from _in_settings(rows)
    yield from untuned(rows)


def _in_settings(rows: Sequence[Row]) -> Iterator[str]:
    """Compare the measured rate with the best of a sweep in other settings than the tasks' own."""
    body = []
    for task in TASKS:
        for setting in SETTINGS:
            names = f"{MEASURED}, {setting}", f"{PLAIN}, {setting}"
            for r in ranks_of(rows):
                if found := difference(rows, f"{task} by loss", r, *names):
                    rates = [shown_rate(entries()[name], r, rows, f"{task} by loss") for name in names]
                    losses = [f"{found.base + found.mean:.4f}", f"{found.base:.4f}"]
                    body.append([task, setting, str(r), str(found.seeds), *losses, *rates, str(found)])
    if body:
        yield from ("### Learning rates measured in other settings", "")
        yield "The base in 4 bits, larger batches or more steps, each next to a sweep in that setting."
        yield ""
        columns = ["task", "setting", "r", "seeds", "loss at the measured rate", "at the best of a sweep"]
        yield from (*table([*columns, "measured rate", "best rate", "difference"], body), "")


def _rates(rows: Sequence[Row], entry: str, title: str, text: str) -> Iterator[str]:
    """Compare an entry that finds its own rate with the others, over their common seeds."""
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
        columns = ["task", "r", "seeds", "loss at 2e-3", "at the found rate", "found rate", "difference from 2e-3"]
        yield from table([*columns, "at the best of a sweep", "difference from that"], body)
        yield ""


def untuned(rows: Sequence[Row]) -> Iterator[str]:
    """Compare LoRA at a usual rate with the best of its sweep, over their common seeds."""
    body = []
    for task in TASKS:
        for name in ("LoRA r=1", LORA):
            at = f"{task} by loss", entries()[name].rank(0)
            if found := difference(rows, *at, name + UNTUNED, name):
                losses = f"{found.base + found.mean:.4f}", f"{found.base:.4f}"
                body.append([task, name, str(found.seeds), losses[0], shown_rate(entries()[name], at[1], rows, at[0])])
                body[-1] += [losses[1], str(found)]
    if body:
        yield from ("### LoRA at a usual rate", "")
        yield "LoRA at 2e-4, the rate in TRL's guide to adapters, and at the best rate of a sweep of complete runs."
        yield ""
        columns = ["task", "entry", "seeds", "loss at 2e-4", "best rate", "loss at the best", "difference"]
        yield from (*table(columns, body, left=2), "")


def sides(rows: Sequence[Row]) -> Iterator[str]:
    """Compare LoRA-XS with Σ in A and with Σ in B, over their common seeds."""
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
            f"LoRA-XS's authors factor Wᵀ = UΣVᵀ and put UΣ on the input side, A (`{LORA_XS[0]}` here, "
            f'`init="lora-xs"`); `{LORA_XS[1]}` (`"lora-xs-output"`) has Σ in B, like LoRA-XS in *Methods side by '
            "side*. AdamW's steps of R differ between the two.",
            "",
        )
        columns = ["task", "r", "seeds", "rate, Σ in A", "Σ in B", "loss, Σ in A", "Σ in B", "difference, A from B"]
        yield from table(columns, body)
        yield ""


def how_long(results: Path) -> Iterator[str]:
    """Yield the energy that each start's subspace keeps during training."""
    found = read_csv(results / lasting.FILE)
    if not found:
        return
    yield from ("### How long a subspace holds the gradient (`lasting`)", "")
    yield from (
        "The subspaces are made at W0 from 32 samples; G is the gradient of 32 other samples, before and during full "
        "fine-tuning of SmolLM2-135M. The table shows ‖UᵀGV‖²/‖G‖² over all layers.",
        "",
    )
    yield from table(list(lasting.HEAD), lasting.shown(found))
    yield from ("", where_rows(found))
    yield from picture("Energy of the gradient in each start's subspace, by steps of training", "lasting.png")
