"""Methods side by side: one table per task, the verdicts, and why the paper's ordering is not reproduced."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research import reinforcement
from benchmarks.research.methods.grid import CORE, METHODS, SGD, TASKS, Task
from benchmarks.research.methods.tables import Line, lines, plus_minus, spread
from benchmarks.research.reporting.charts import draw_rates, draw_scores
from benchmarks.research.reporting.labels import label, short
from benchmarks.research.reporting.markdown import picture, table, where, where_rows
from benchmarks.research.reporting.verdicts import SMALLEST, Verdict, against_lora, against_others, against_xs
from benchmarks.research.reporting.why import explanation

INTRODUCTION = """\
Every method sees the same examples in the same order, with the same schedule (10% warm-up, then linear to zero), AdamW
without weight decay (LoRA-Pro has its own AdamW) and clipping at norm 1. Learning rates are searched with one seed on a
validation split: three per method, then more for as long as the best one is at an end of those tried. Best means the
lowest loss, on CoLA the highest score, because there the loss of an overfitting model rises before its score falls.
Three seeds at the best rate then run on the test split. `trained` counts only the adapters. Do not compare times
between rows: two runs share two cores, and a table's runs may come from several processors, named below it.
`python -m benchmarks.research.methods --data-dir DATA` runs it.

LoRA, rsLoRA, PiSSA, DoRA and LoRA-GA are PEFT's, LoRA-Pro is `lora-pro-adamw` on PEFT's LoRA; alpha = r for all. PEFT's
LoRA-GA scales its factors differently from the authors' code. Language models have a bf16 base: PEFT computes its
adapters in fp32, LoRA-SB and LoRA-XS keep A and B in bf16 and R in fp32, and full fine-tuning keeps fp32 weights and
trains under autocast. `LoRA-SB (sgd)` is LoRA-SB with `update="sgd"`: factors from the mean gradient instead of its
sign. `LoRA-SB (whole step)` is LoRA-SB with `longest_start=None`, the start of the paper's text. The paper's code
starts closer to zero: to get η it counts batches of the estimation instead of training steps, and on Mistral-7B there
are ten times as many (`first_step_lr(rule="published")`); a limit of 4 steps gives about the same start there. LoRA-XS
has its Σ in B here; its authors have it in A (`python -m benchmarks.research.paired` has both)."""
VERDICTS = f"""\
Two means are *level* if they differ by no more than one standard deviation of the difference of two runs (± below) or,
for scores, by no more than {SMALLEST:g} (two answers of 200). With three seeds each, one or two of ten equally good
pairs come out better or worse by chance:"""
LINEARS = "all linear layers"
ADAPTED = {"cola": "an encoder of 22.7M parameters, its self-attention and a new head, fp32"}  # others: LINEARS
HEAD = ("method", "r", "best lr", "seeds", "trained", "loss", "init s", "train s", "peak MB")


def section(rows: Sequence[Row], folder: Path) -> list[str]:
    """Return the section with all tasks that have test runs."""
    out = ["## Methods side by side", "", INTRODUCTION, "", *in_short(rows), ""]
    drawn = [task for task in TASKS.values() if lines(rows, task.name)]
    if drawn:
        draw_scores(rows, drawn, folder / "methods.png")
        draw_rates(rows, drawn, folder / "rates.png")
        out += picture("Test score of every method, mean and standard deviation over seeds", "methods.png")
        out += picture("Validation loss, or score, by learning rate", "rates.png")
        out += ["The best of the rates tried:", "", *best_rates(rows, drawn), ""]
    for task in drawn:
        out += one_task(rows, task)
    return [*out, *rewards(folder)]


def rewards(folder: Path) -> Iterator[str]:
    """Yield the table of GRPO by rank, if it was run."""
    found = read_csv(folder / reinforcement.FILE)
    body = list(reinforcement.lines(found))
    if body:
        yield from ("### Reinforcement learning by rank", "", f"{reinforcement.title(found)}.", "")
        yield from table(list(reinforcement.HEAD), body)
        yield from ("", where_rows(found), "")


def best_rates(rows: Sequence[Row], tasks: Sequence[Task]) -> list[str]:
    """Return a table with one row per method and one column per task; with the rank if the rate depends on it."""
    found: dict[str, dict[str, list[str]]] = {}
    for task in tasks:
        for line in lines(rows, task.name):
            rate = f"{line.lr:g} (r={line.r})" if METHODS[line.method].family == CORE else f"{line.lr:g}"
            found.setdefault(line.method, {}).setdefault(task.name, []).append(rate)
    named = (name for name in METHODS if name in found)
    body = ([name, *(", ".join(found[name].get(task.name, "-")) for task in tasks)] for name in named)
    return table(["method", *(task.name for task in tasks)], body)


def one_task(rows: Sequence[Row], task: Task) -> list[str]:
    """Return a task's table and verdicts."""
    arrow = "more" if task.higher_is_better else "less"
    size = f"{task.steps} steps of {task.batch}; n = {task.test} test and {task.validation} validation examples"
    if task.longest:
        size += f", of at most {task.longest} tokens"
    head = [*HEAD[:5], *([task.metric] if task.higher_is_better else []), *HEAD[5:]]
    mine = [row for row in rows if row["task"] == task.name and row["split"] == "test" and not row["variant"]]
    before = statistics.fmean(float(row["loss_before"]) for row in mine)
    tuned = f"{task.model}, {ADAPTED.get(task.name, LINEARS)}"
    about = f"{tuned}; {size}; {task.metric}: {arrow} is better; loss before training {before:.3f}."
    out = [f"### {task.name}", "", about, ""]
    out += [*table(head, (_row(line, task) for line in lines(rows, task.name))), "", where_rows(mine), ""]
    xs, others = against_xs(rows, task.name), against_others(rows, task.name)
    both = [*xs, *others, *against_xs(rows, task.name, SGD), *against_others(rows, task.name, SGD)]
    return out + _sentences(both) + why_not(rows, task, xs, others)


def _sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the verdicts below a line with their criterion; nothing without verdicts."""
    if not verdicts:
        return []
    return [VERDICTS, "", *map(sentence, verdicts), ""]


def _row(line: Line, task: Task) -> list[str]:
    return [
        line.method,
        str(line.r or "-"),
        f"{line.lr:g}",
        str(len(line.scores)),
        f"{line.params:,}",
        *([_spread(line.scores)] if task.higher_is_better else []),
        _spread(line.losses),
        f"{line.init_seconds:.1f}",
        f"{line.seconds:.0f}",
        f"{line.memory:,.0f}",
    ]


def _spread(values: Sequence[float]) -> str:
    return plus_minus(*spread(values)) if len(values) > 1 else f"{values[0]:.3f}"


def sentence(verdict: Verdict) -> str:
    """Return a verdict as a list item; the difference is LoRA-SB's value minus the other's."""
    fewer = f", {verdict.trained:.2g}x the trained parameters" if verdict.trained < 0.95 else ""
    lower = verdict.measure == "loss" or not TASKS[verdict.task].higher_is_better
    measure = "loss" if verdict.measure == "loss" else TASKS[verdict.task].metric
    return (
        f"- {label(verdict.ours)} is **{verdict.word}** {'than' if verdict.word != 'level' else 'with'} "
        f"{label(verdict.theirs)} in {measure} "
        f"({-verdict.gain if lower else verdict.gain:+.3f} ± {verdict.deviation:.3f}{fewer})"
    )


def why_not(rows: Sequence[Row], task: Task, xs: Sequence[Verdict], others: Sequence[Verdict]) -> list[str]:
    """Return where the paper's ordering is not reproduced, and the best explanations that experiments support."""
    missed = [f"{v.word} {_than(v)} at equal r in {v.measure}, r={v.ours.r}" for v in xs if v.word != "better"]
    missed += [f"worse than {label(v.theirs)}" for v in others if v.word == "worse" and v.ours.r == task.ranks[-1]]
    if not missed:
        return []
    return [f"#### {task.name}: why not", "", f"LoRA-SB is {'; '.join(missed)}.", "", *explanation(rows, task), ""]


def _than(verdict: Verdict) -> str:
    return f"{'with' if verdict.word == 'level' else 'than'} {verdict.theirs.method}"


def headline(rows: Sequence[Row]) -> list[str]:
    """Return a short table: one row per task, each method at its largest rank."""
    names = {"LoRA-SB": "LoRA-SB", SGD: '`update="sgd"`', "LoRA-XS": "LoRA-XS", "LoRA": "LoRA", "full": "full"}
    found = {task: {line.method: line for line in lines(rows, task)} for task in TASKS}  # the largest rank is the last
    shown = [name for name in names if any(name in of for of in found.values())]
    body = []
    for task, of in found.items():
        if "LoRA-SB" in of:
            arrow = "more" if TASKS[task].higher_is_better else "less"
            body.append([f"{task}: {TASKS[task].metric} ({arrow} is better)", *(_cell(of.get(name)) for name in shown)])
    return [*table(["", *(names[name] for name in shown)], body), "", *in_short(rows)]


NAMES = {"chain_sum": "sums", "word_sequence_reversal": "word reversal", "cola": "CoLA"}  # other names are unchanged
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
OUTCOMES = {"worse": "beats", "level": "ties with", "better": "loses to"}  # LoRA's outcome, by our verdict


def in_short(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence that compares the default with LoRA on all tasks, with models and seeds; nothing before runs."""
    if not (found := against_lora(rows)):
        return
    by_size: dict[tuple[int, int, str], list[Verdict]] = {}
    for verdict in found:
        key = verdict.theirs.r, verdict.ours.r, _number(1 / verdict.trained)
        by_size.setdefault(key, []).append(verdict)
    clauses: list[str] = []
    for (theirs, ours, times), group in by_size.items():
        size = f"with {times} times" if clauses else f"With {times} times the parameters"
        by_word = {word: [_name(verdict.task) for verdict in group if verdict.word == word] for word in OUTCOMES}
        found_words = [(OUTCOMES[word], _listed(tasks)) for word, tasks in by_word.items() if tasks]
        named = zip(found_words, (f"our r = {ours}", "it", "it"), strict=False)
        outcomes = ", and ".join(f"{verb} {ours_named} on {tasks}" for (verb, tasks), ours_named in named)
        clauses.append(f"{size}, LoRA of rank {theirs} {outcomes}")
    model, other_models = _usual({_name(verdict.task): TASKS[verdict.task].model for verdict in found})
    where_run = "; ".join([model, *other_models, f"{_number(len(found[0].ours.scores))} seeds"])
    tie = f"within one standard deviation of the difference of two runs, or within {SMALLEST:g}"
    yield f"{'; '.join(clauses)} ({where_run}; a tie is {tie})."


def _name(task: str) -> str:
    """Return a task's name for use in a sentence."""
    return NAMES.get(task, task)


def _usual(by_task: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the most frequent value, and the tasks with another one."""
    usual = statistics.mode(by_task.values())
    return usual, [f"{task}: {value}" for task, value in by_task.items() if value != usual]


def _number(value: float) -> str:
    """Round a number, and spell it out up to twelve."""
    return NUMBERS[round(value)] if round(value) < len(NUMBERS) else f"{value:.0f}"


def _listed(names: Sequence[str]) -> str:
    """Join names as in a sentence: a, b and c."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    size = f"r={line.r}, {short(line.params)}" if line.r else short(line.params)
    return f"{_spread(line.scores)} ({size})"


def floors(found: dict[str, Any]) -> Iterator[str]:
    """Yield the section on tasks with few right answers."""
    if not found:
        return
    yield from ("## Tasks that are too hard for the model", "")
    yield "One run each with LoRA-SB, without a sweep of rates and with one seed. Compare the share of right answers"
    yield "before and after; chance is about 0.25 on ARC-Easy. Losses are on the task's first test examples."
    yield ""
    head = ["task", "r", "lr", "examples", "n", "answers before", "after", "loss before", "after"]
    yield from table(head, (_floor(row) for row in found["rows"]))
    yield from ("", where(found), "")


def _floor(row: dict[str, Any]) -> list[str]:
    return [
        row["task"],
        str(row["r"]),
        f"{row['lr']:g}",
        str(row["examples"]),
        str(row["n"]),
        f"{row['before']:.3f}",
        f"{row['after']:.3f}",
        f"{row['loss_before']:.3f}",
        f"{row['loss_after']:.3f}",
    ]
