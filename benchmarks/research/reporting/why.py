"""Why an ordering of the paper does not show: what the sweeps and the ablations support, in their numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common.csv_files import Row
from benchmarks.research.methods import grid
from benchmarks.research.methods.grid import METHODS, SGD, TASKS, WHOLE, Task
from benchmarks.research.methods.tables import Line, plus_minus
from benchmarks.research.paper.ablations import ABLATIONS, STARTS, SUBSPACES, summary
from benchmarks.research.reporting.verdicts import compare, lines
from lorasb.init.initialization import LONGEST_START

CHAIN = TASKS["chain_sum"]
SUBSPACES_TELL = (  # what it tells that one subspace is ahead of another at every rank
    (" G is ahead of its sign at both.", "G", "sign(G)"),
    (" LoRA-XS owes its loss to Σ, not to W's subspace alone.", "W with its Σ", "W without its Σ"),
)
STARTS_OF_IT = {WHOLE: "with the whole first step as its start", SGD: 'with `update="sgd"`'}


def explanation(rows: Sequence[Row], task: Task) -> list[str]:
    """A list of what is known; each item has an experiment behind it."""
    own = [*by_loss(rows, task), *own_runs(rows, task), *length(rows, task), *rates(rows, task)]
    ablated = [*beginnings(rows), *subspaces(rows), *signs(rows)]
    if ablated and task is not CHAIN:
        ablated = [f"Ablations of the subspace and of the sign were made on {CHAIN.name}: its *why not* has them."]
    return [f"- {item}" for item in (*ablated, *own)] or ["No experiment explains it yet."]


def subspaces(rows: Sequence[Row]) -> Iterator[str]:
    """G's, sign(G)'s and W's, with LoRA-XS's Σ and without."""
    found = {line["variant"]: line for line in summary(ABLATIONS["subspace"], rows)}
    names = {"G": "G", "sign(G)": "sign(G)", "W with its Σ": "W, B = U Σ (LoRA-XS)", "W without its Σ": "W, B = U"}
    if not found.keys() >= {f"{label}, r={r}" for r in SUBSPACES for label in names.values()}:
        return
    by_rank = [{name: found[f"{label}, r={r}"] for name, label in names.items()} for r in SUBSPACES]
    parts = []
    for r, of in zip(SUBSPACES, by_rank, strict=True):
        ordered = sorted(of.items(), key=lambda item: item[1]["loss"])
        parts.append(f"r={r}: " + ", ".join(f"{n} {plus_minus(v['loss'], v['loss_sd'])}" for n, v in ordered))
    told = "".join(text for text, less, more in SUBSPACES_TELL if all(_apart(of[less], of[more]) for of in by_rank))
    yield (
        "Loss by the matrix that B and A are of, each at the best of the rates tried for it, least first "
        f"({CHAIN.name}, validation, `subspace` below): {'; '.join(parts)}.{told}"
    )


def _apart(less: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    """By more than one standard deviation of the difference."""
    return float(more["loss"] - less["loss"]) > math.hypot(less["loss_sd"], more["loss_sd"])


def beginnings(rows: Sequence[Row]) -> Iterator[str]:
    """How long the start was, which was ours, and is mended."""
    found = {line["variant"]: line for line in summary(ABLATIONS["start"], rows)}
    parts = [
        f"{line['over']:+.3f} ± {line['over_sd']:.3f} at r={r}, lr {lr:g}"
        for r, lr in STARTS
        if (line := found.get(f"whole, r={r}"))
    ]
    if parts:
        yield (
            "How far R starts: with η the rate of R's first step, the whole first step of full fine-tuning is many of "
            "AdamW's steps of R long (`lengths` below), and where it points the wrong way training has to undo it. "
            f"`longest_start` keeps it to {LONGEST_START:g}. Starting with the whole of "
            f"it changes the loss on {CHAIN.name} by {', '.join(parts)} (same seeds and rate; `start` below)."
        )


def signs(rows: Sequence[Row]) -> Iterator[str]:
    """sign(G) against G, from starts of like length."""
    found = {line["variant"]: line for line in summary(ABLATIONS["update"], rows)}
    parts = [
        f"{found[name]['over']:+.3f} ± {found[name]['over_sd']:.3f} at r={r}"
        for r, _ in STARTS
        if (name := f"G, r={r}") in found
    ]
    if parts:
        yield (
            'The sign itself: taken from the mean gradient (`update="sgd"`), the factors lead to a loss on '
            f"{CHAIN.name} that differs from the sign's by {', '.join(parts)} (same seeds and rate; `update` below). A "
            "few samples' G has a low rank and its sign has not: G's leading r directions keep nearly all of G, those "
            "of sign(G) far less."
        )


def by_loss(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """Where score and loss order LoRA-SB and LoRA differently."""
    found = {line.method: line for line in lines(rows, task.name)}  # the largest rank is the last
    mine, lora = found.get("LoRA-SB"), found.get("LoRA")
    if mine is None or lora is None:
        return
    score, loss = (compare(task.name, mine, lora, measure).word for measure in ("score", "loss"))
    if score == "worse" and loss != "worse":
        yield (
            f"In loss LoRA-SB is {loss} {'with' if loss == 'level' else 'than'} LoRA on the same test runs: "
            f"{plus_minus(*mine.loss)} at r={mine.r} against {plus_minus(*lora.loss)}."
        )


def own_runs(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """LoRA-SB's other starts on this task's test split, and how much of G the factors keep."""
    found = {(line.method, line.r): line for line in lines(rows, task.name)}
    for r in task.ranks:
        mine = found.get(("LoRA-SB", r))
        parts = [
            f"{what} {plus_minus(*other.loss)} ({compare(task.name, other, mine, 'loss').word})"
            for method, what in STARTS_OF_IT.items()
            if mine and (other := found.get((method, r)))
        ]
        if mine and parts:
            yield (
                f"On this task's test split at r={r}, each at its own best rate, LoRA-SB has a loss of "
                f"{plus_minus(*mine.loss)}, {', '.join(parts)}.{_kept(mine, found.get((SGD, r)))}"
            )


def _kept(mine: Line, gradient: Line | None) -> str:
    if gradient is None or not (mine.kept and gradient.kept):
        return ""
    kept = f"{mine.kept:.1%} of the energy of the samples' G, the gradient's own {gradient.kept:.1%}"
    return f" The sign's factors keep {kept}."


def length(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """Whether more steps bring LoRA-SB nearer to LoRA."""
    ablation = ABLATIONS["cola"]
    if task is not ablation.task:
        return
    found = {line["variant"]: line for line in summary(ablation, rows)}
    steps = 2 * task.steps
    if all(name in found for of in ("LoRA-SB", "LoRA") for name in (of, f"{of}, {steps} steps")):
        scores = {name: plus_minus(line["score"], line["score_sd"]) for name, line in found.items()}
        yield (
            f"These runs are of {task.steps * task.batch / task.examples:.0f} epochs; the paper trains on CoLA for 30. "
            f"Twice the steps take LoRA-SB from {scores['LoRA-SB']} to {scores[f'LoRA-SB, {steps} steps']} and LoRA "
            f"from {scores['LoRA']} to {scores[f'LoRA, {steps} steps']} (`cola` below)."
        )


def rates(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """How far the best rates lie apart, and what a method loses beside them."""
    lines = [(method, r) for method in ("LoRA-SB", "LoRA-XS") for r in task.ranks]
    best = {(method, r): grid.best_rate(task, METHODS[method], r, rows) for method, r in lines}
    tried = [len(grid.swept(task, METHODS[method], r, rows)) for (method, r), rate in best.items() if rate is not None]
    parts = [f"{method} r={r}: {rate:g}" for (method, r), rate in best.items() if rate is not None]
    if parts:
        searched = f"Rates were searched ({statistics.fmean(tried):.1f} of each on average)"
        yield f"{searched}; the best are {'; '.join(parts)}. {_elsewhere(rows, task)}"


def _elsewhere(rows: Sequence[Row], task: Task) -> str:
    """The worst of the sweep at the largest rank, within four times the best rate either way."""
    r, parts = task.ranks[-1], []
    measure, worst_of = ("score", min) if task.by_score and task.higher_is_better else ("loss", max)
    for method in ("LoRA-SB", "LoRA-XS"):
        rate = grid.best_rate(task, METHODS[method], r, rows)
        found = grid.swept(task, METHODS[method], r, rows, measure)
        if rate is not None:
            near = {lr: value for lr, value in found.items() if rate / 4.1 <= lr <= 4.1 * rate}
            worst = worst_of(near, key=lambda lr: near[lr])
            parts.append(f"{method} from {found[rate]:.3f} to {near[worst]:.3f} (at {worst:g})")
    name = task.metric if measure == "score" else "loss"
    told = f"Of the rates within a factor of four of the best at r={r} (validation), the worst takes the {name} of"
    return f"{told} {' and that of '.join(parts)}." if parts else ""
