"""Methods side by side: a table and a panel a task, the verdicts, and why an ordering does not show."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import grid
from benchmarks.methods.grid import METHODS, TASKS, Task
from benchmarks.methods.tables import Line, lines
from benchmarks.reporting.markdown import Row, picture, plus_minus, table, where_rows
from benchmarks.reporting.verdicts import Verdict, against_lora, against_xs
from benchmarks.reporting.why import explanation
from lorasb.files import replacing
from lorasb.plotting import GRAD, INK, MUTED, SIGN

COLOURS = {"LoRA-SB": GRAD, "LoRA-XS": SIGN, "full": INK, "LoRA-SB (sgd)": "#b0527a"}
MODEL = {"cola": "a MiniLM encoder of 22.7M parameters, self-attention and a new head, fp32"}
SGD = "LoRA-SB (sgd)"  # from the mean gradient instead of its sign
LM = "SmolLM2-135M, all linear layers, bf16 base and fp32 adapters"


def label(line: Line) -> str:
    """A method and its rank."""
    return f"{line.method}, r={line.r}" if line.r else "full fine-tuning"


def section(rows: Sequence[Row], folder: Path) -> list[str]:
    """All tasks that have test runs."""
    out = ["## Methods side by side", "", INTRODUCTION, ""]
    drawn = [task for task in TASKS.values() if lines(rows, task.name)]
    if drawn:
        draw_scores(rows, drawn, folder / "methods.png")
        draw_rates(rows, drawn, folder / "rates.png")
        out += picture("Test score of every method, mean and standard deviation over seeds", "results/methods.png")
        out += picture("Validation loss by learning rate", "results/rates.png")
    for task in drawn:
        out += one_task(rows, task)
    return out


INTRODUCTION = """\
Every method sees the same examples in the same order, the same schedule (10% warm-up, then linear to zero), AdamW
without weight decay and clipping at norm 1. Learning rates: three for each on a validation split by one seed, then
outward for as long as the best is the last one tried; three seeds at the best rate on the test split. `trained` counts
the adapters alone. Peak memory is of the whole process. `python -m benchmarks.methods --data-dir DATA` runs it."""


def one_task(rows: Sequence[Row], task: Task) -> list[str]:
    """Table and verdicts."""
    found = lines(rows, task.name)
    arrow = "more" if task.higher_is_better else "less"
    size = f"{task.steps} steps of {task.batch}; n = {task.test} test and {task.validation} validation examples"
    scored = task.higher_is_better
    head = [
        "method",
        "r",
        "best lr",
        "seeds",
        "trained",
        *([task.metric] if scored else []),
        "loss",
        "init s",
        "train s",
        "peak MB",
    ]
    body = (
        [line.method, str(line.r or "-"), f"{line.lr:g}", str(len(line.scores)), f"{line.params:,}",
         *([plus_minus(*line.score)] if scored else []), plus_minus(*line.loss),
         f"{line.init_seconds:.1f}", f"{line.seconds:.0f}", f"{line.memory:,.0f}"]
        for line in found
    )  # fmt: skip
    mine = [row for row in rows if row["task"] == task.name and row["split"] == "test" and not row["variant"]]
    before = statistics.fmean(float(row["loss_before"]) for row in mine)
    about = f"{MODEL.get(task.name, LM)}; {size}; {task.metric}: {arrow} is better; loss before training {before:.3f}."
    out = [f"### {task.name}", "", about, "", *table(head, body), "", where_rows(mine), ""]
    xs, lora = against_xs(rows, task.name), against_lora(rows, task.name)
    if xs or lora:
        out += ["LoRA-SB beside others (±: standard deviation of the difference of two runs):", ""]
        both = [*xs, *lora, *against_xs(rows, task.name, SGD), *against_lora(rows, task.name, SGD)]
        out += [sentence(verdict) for verdict in both] + [""]
    return out + why_not(rows, task, xs, lora)


def sentence(verdict: Verdict) -> str:
    """A verdict as a list item."""
    fewer = f", {verdict.fewer:.1f}x fewer trained" if verdict.fewer > 1.05 else ""
    measure = "loss" if verdict.measure == "loss" else TASKS[verdict.task].metric
    sign = -verdict.gain if verdict.measure == "loss" or not TASKS[verdict.task].higher_is_better else verdict.gain
    return (
        f"- {label(verdict.ours)} and {label(verdict.theirs)}: **{verdict.word}** in {measure} "
        f"({sign:+.3f} ± {verdict.deviation:.3f}{fewer})"
    )


def why_not(rows: Sequence[Row], task: Task, xs: Sequence[Verdict], lora: Sequence[Verdict]) -> list[str]:
    """Where the paper's ordering does not show: which, and the best explanation that an experiment supports."""
    missed = [f"LoRA-XS at r={v.ours.r} in {v.measure} ({v.word})" for v in xs if v.word != "above"]
    if lora and lora[-1].word == "below":
        missed.append(f"LoRA at LoRA-SB's largest r={lora[-1].ours.r} (below)")
    if not missed:
        return []
    return [
        f"## {task.name}: why not",
        "",
        f"LoRA-SB is not above {'; '.join(missed)}.",
        "",
        *explanation(rows, task),
        "",
    ]


def headline(rows: Sequence[Row]) -> list[str]:
    """What a README has room for: a line a task, each method at its largest rank."""
    body = []
    for task in TASKS.values():
        found = {line.method: line for line in lines(rows, task.name)}  # the largest rank is the last
        if "LoRA-SB" in found:
            cells = [_cell(found.get(name)) for name in ("LoRA-SB", SGD, "LoRA-XS", "LoRA", "full")]
            arrow = "more" if task.higher_is_better else "less"
            body.append([f"{task.name}: {task.metric} ({arrow} is better)", *cells])
    return table(["", "LoRA-SB", "LoRA-SB from G", "LoRA-XS", "LoRA", "full"], body)


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    size = f"r={line.r}, {_count(line.params)}" if line.r else _count(line.params)
    return f"{plus_minus(*line.score)} ({size})"


def draw_scores(rows: Sequence[Row], tasks: Sequence[Task], path: Path) -> None:
    """A panel a task; a line a method, with its trained parameters."""
    figure, axes = _panels(len(tasks), 3.4)
    for one, task in zip(axes, tasks, strict=False):
        found = lines(rows, task.name)
        for i, line in enumerate(found):
            mean, deviation = line.score
            one.errorbar(mean, i, xerr=deviation, fmt="o", color=COLOURS.get(line.method, MUTED), capsize=3, ms=5)
            one.plot(line.scores, [i] * len(line.scores), ".", color=INK, ms=2.5)
        one.set_yticks(range(len(found)), [f"{label(line)}  ({_count(line.params)})" for line in found], fontsize=7.5)
        one.invert_yaxis()
        arrow = "right is better" if task.higher_is_better else "left is better"
        seeds = len(found[0].scores)
        one.set_xlabel(f"{task.metric} ({arrow}; n = {task.test}, {seeds} seeds, mean ± sd)", fontsize=8)
        one.set_title(task.name, fontsize=10)
    _save(figure, axes, path)


def draw_rates(rows: Sequence[Row], tasks: Sequence[Task], path: Path) -> None:
    """Sweeps of every method at its largest rank."""
    figure, axes = _panels(len(tasks), 3.0)
    for one, task in zip(axes, tasks, strict=False):
        for method in METHODS.values():
            r = grid.ranks(task, method)[0]
            found = grid.swept(task, method, r, rows)
            rates = sorted(found)
            style = "-o" if method.name in COLOURS else "--."
            one.plot(rates, [found[lr] for lr in rates], style, ms=4, color=COLOURS.get(method.name), lw=1.2,
                     label=f"{method.name}, r={r}" if r else method.name)  # fmt: skip
        one.set(xscale="log", title=task.name)
        one.set_xlabel("peak learning rate (one seed)", fontsize=8)
        one.set_ylabel(f"validation loss (nats), n = {task.validation}", fontsize=7.5)
        one.legend(frameon=False, fontsize=6, ncols=2)
    _save(figure, axes, path)


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    down = -(-count // 2)
    figure, axes = pyplot.subplots(down, 2, figsize=(11, height * down), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def _save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    from matplotlib import pyplot

    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.set_visible(bool(one.get_title()))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")
    pyplot.close(figure)


def _count(parameters: int) -> str:
    """For people."""
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.1f}k"


def floors(found: dict[str, Any]) -> Iterator[str]:
    """Tasks at the floor."""
    if not found:
        return
    yield from ("## Tasks at the floor", "")
    yield "One run each with LoRA-SB, no sweep, no seeds: a model of 135M parameters does not learn what is asked for."
    yield ""
    head = ["task", "r", "lr", "examples", "n", "before", "after", "loss before", "loss after"]
    yield from table(head, (
        [row["task"], str(row["r"]), f"{row['lr']:g}", str(row["examples"]), str(row["n"]), f"{row['before']:.3f}",
         f"{row['after']:.3f}", f"{row['loss_before']:.3f}", f"{row['loss_after']:.3f}"]
        for row in found["rows"]
    ))  # fmt: skip
    yield ""
