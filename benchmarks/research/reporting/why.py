"""Why an ordering of the paper is not reproduced: what the sweeps and ablations support, with their numbers."""

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
CONCLUSIONS = (  # what follows if one subspace has a lower loss than another at every rank
    (" At both ranks G has a lower loss than its sign.", "G", "sign(G)"),
    (" At both ranks LoRA-XS has a lower loss with Σ than without.", "W with its Σ", "W without its Σ"),
)
STARTS_OF_IT = {WHOLE: "started with the whole first step", SGD: 'with `update="sgd"`'}


def explanation(rows: Sequence[Row], task: Task) -> list[str]:
    """Return a list of explanations, each with its experiment."""
    own = [*by_loss(rows, task), *own_runs(rows, task), *length(rows, task), *rates(rows, task)]
    ablated = [*beginnings(rows), *subspaces(rows), *signs(rows)]
    if ablated and task is not CHAIN:
        ablated = [f"Subspace and sign were varied on {CHAIN.name} only: see its *why not*."]
    return [f"- {item}" for item in (*ablated, *own)] or ["No experiment explains it yet."]


def subspaces(rows: Sequence[Row]) -> Iterator[str]:
    """Compare the subspaces of G, of sign(G) and of W, this with and without LoRA-XS's Σ."""
    found = {line["variant"]: line for line in summary(ABLATIONS["subspace"], rows)}
    names = {"G": "G", "sign(G)": "sign(G)", "W with its Σ": "W, B = U Σ (LoRA-XS)", "W without its Σ": "W, B = U"}
    if not found.keys() >= {f"{label}, r={r}" for r in SUBSPACES for label in names.values()}:
        return
    by_rank = [{name: found[f"{label}, r={r}"] for name, label in names.items()} for r in SUBSPACES]
    parts = []
    for r, of in zip(SUBSPACES, by_rank, strict=True):
        ordered = sorted(of.items(), key=lambda item: item[1]["loss"])
        parts.append(f"r={r}: " + ", ".join(f"{n} {plus_minus(v['loss'], v['loss_sd'])}" for n, v in ordered))
    follows = "".join(text for text, less, more in CONCLUSIONS if all(_apart(of[less], of[more]) for of in by_rank))
    yield (
        "Loss by the matrix whose singular vectors are B and A, lowest first, each at the best rate tried for it "
        f"({CHAIN.name}, validation, `subspace` below): {'; '.join(parts)}.{follows}"
    )


def _apart(less: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    """True if the first is lower by more than one standard deviation of the difference."""
    return float(more["loss"] - less["loss"]) > math.hypot(less["loss_sd"], more["loss_sd"])


def beginnings(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what limiting the length of the start changes."""
    found = {line["variant"]: line for line in summary(ABLATIONS["start"], rows)}
    parts = [
        f"{line['over']:+.3f} ± {line['over_sd']:.3f} at r={r}, lr {lr:g}"
        for r, lr in STARTS
        if (line := found.get(f"whole, r={r}"))
    ]
    if parts:
        yield (
            "Length of the start: with η equal to the rate of R's first step, the whole first step of full fine-tuning "
            "is as long as many AdamW steps of R (`lengths` below), and where it points the wrong way, training has to "
            f"undo it. `longest_start` limits it to {LONGEST_START:g} steps. Starting with the whole step changes the "
            f"loss on {CHAIN.name} by {', '.join(parts)} (same seeds and rate; `start` below)."
        )


def signs(rows: Sequence[Row]) -> Iterator[str]:
    """Compare sign(G) with G, from starts of similar length."""
    found = {line["variant"]: line for line in summary(ABLATIONS["update"], rows)}
    parts = [
        f"{found[name]['over']:+.3f} ± {found[name]['over_sd']:.3f} at r={r}"
        for r, _ in STARTS
        if (name := f"G, r={r}") in found
    ]
    if parts:
        yield (
            'The sign: factors from the mean gradient (`update="sgd"`) change the loss on '
            f"{CHAIN.name} by {', '.join(parts)} (same seeds and rate; `update` below). The gradient G of a few "
            "samples has a low rank, but its sign does not: the leading r directions of G keep nearly all of G, and "
            "those of sign(G) far less."
        )


def by_loss(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """Yield where score and loss rank LoRA-SB and LoRA differently."""
    found = {line.method: line for line in lines(rows, task.name)}  # the largest rank is the last
    mine, lora = found.get("LoRA-SB"), found.get("LoRA")
    if mine is None or lora is None:
        return
    score, loss = (compare(task.name, mine, lora, measure).word for measure in ("score", "loss"))
    if score == "worse" and loss != "worse":
        yield (
            f"By loss LoRA-SB is {loss} {'with' if loss == 'level' else 'than'} LoRA on the same test runs: "
            f"{plus_minus(*mine.loss)} at r={mine.r} against {plus_minus(*lora.loss)}."
        )


def own_runs(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """Compare LoRA-SB's other starts on this task's test split, and how much of G their factors keep."""
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
                f"Test loss at r={r}, each at its best rate: LoRA-SB "
                f"{plus_minus(*mine.loss)}, {', '.join(parts)}.{_kept(mine, found.get((SGD, r)))}"
            )


def _kept(mine: Line, gradient: Line | None) -> str:
    if gradient is None or not (mine.kept and gradient.kept):
        return ""
    kept = f"{mine.kept:.1%} of the energy of the samples' G, and those of G keep {gradient.kept:.1%}"
    return f" The factors of sign(G) keep {kept}."


def length(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """Yield whether more steps bring LoRA-SB nearer to LoRA."""
    ablation = ABLATIONS["cola"]
    if task is not ablation.task:
        return
    found = {line["variant"]: line for line in summary(ablation, rows)}
    steps = 2 * task.steps
    if all(name in found for of in ("LoRA-SB", "LoRA") for name in (of, f"{of}, {steps} steps")):
        scores = {name: plus_minus(line["score"], line["score_sd"]) for name, line in found.items()}
        yield (
            f"These runs train for {task.steps * task.batch / task.examples:.0f} epochs, the paper's on CoLA for 30. "
            f"Twice as many steps take LoRA-SB from {scores['LoRA-SB']} to {scores[f'LoRA-SB, {steps} steps']} and "
            f"LoRA from {scores['LoRA']} to {scores[f'LoRA, {steps} steps']} (`cola` below)."
        )


def rates(rows: Sequence[Row], task: Task) -> Iterator[str]:
    """Yield the best rates, and what a method loses at other rates."""
    lines = [(method, r) for method in ("LoRA-SB", "LoRA-XS") for r in task.ranks]
    best = {(method, r): grid.best_rate(task, METHODS[method], r, rows) for method, r in lines}
    tried = [len(grid.swept(task, METHODS[method], r, rows)) for (method, r), rate in best.items() if rate is not None]
    parts = [f"{method} r={r}: {rate:g}" for (method, r), rate in best.items() if rate is not None]
    if parts:
        searched = f"{statistics.fmean(tried):.1f} rates were tried per method and rank on average"
        yield f"{searched}; the best are {'; '.join(parts)}. {_elsewhere(rows, task)}"


def _elsewhere(rows: Sequence[Row], task: Task) -> str:
    """Return the worst result of a sweep at the largest rank, within a factor of four of the best rate."""
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
    text = f"The worst rate within a factor of four of the best changes the validation {name} at r={r} for"
    return f"{text} {', and for '.join(parts)}." if parts else ""
