"""One basis for tasks that it was not made from: held-out loss of R on a shared basis, against others.

    python -m benchmarks.research.unseen_tasks [--task spell_backward ...] [--basis own ...] [--r 16 ...] [--seeds 1]
        [--factor 1 ...] [--data-dir DATA]
    python -m benchmarks.research.unseen_tasks --table

Bases are made from the first steps of 1 to 16 families of reasoning-gym, drawn once, and in other ways; tasks are
other families, and ARC-Easy, CoLA (as a question) and gsm8k from DATA. Every run takes the automatic rate (measured on
32 samples, refined by two trials), times --factor. LoRA, which has no such rule, takes the best rate of trials of 12
steps. Rows go to results/unseen-tasks.csv as runs finish, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lorasb
from benchmarks.common.csv_files import Row, read_csv
from benchmarks.common.tables import show
from benchmarks.common.timing import commit, dtype_name, machine_name, measured_dtype, use_dtype
from benchmarks.research.methods.rows import append
from benchmarks.research.methods.run import WARMUP
from benchmarks.research.methods.runner import RESULTS
from benchmarks.research.shared_bases import (
    EIGHT,
    FILES,
    MEAN,
    SHARED,
    TRAIN_STEPS,
    TRAINED,
    UNSEEN,
    Task,
    base,
    lora,
    measured_rate,
    on_shared,
    patched,
    train,
    trials_of,
)
from lorasb.init.auto_rate import warmup_steps
from lorasb.training.rate_trials import find_lr, refine_rate

OWN, RANDOM, LORA_XS, NONE = "own", "random", "lora-xs", "base"
# r = 1 has more parameters than R at r <= 32, r = 3 about as many as at r = 64; 32 is the usual choice
LORAS = {f"LoRA r={r}": r for r in (1, 3, 32)}
LORA = "LoRA r=1"
SMALL = (16, 32)  # ranks with fewer parameters than LoRA r = 1
KINDS = (OWN, *SHARED, RANDOM, LORA_XS, *LORAS, MEAN, NONE)
WITHOUT_RANK = {**LORAS, NONE: 1}  # bases of one rank, whatever --r says
TASKS = (*UNSEEN, *FILES)
RANKS = (8, 16, 32, 64, 128)
FILE = "unseen-tasks.csv"
KEY = ("task", "basis", "r", "seed", "factor")


def adapted(kind: str, r: int, task: Task, model: Any) -> tuple[Any, float | None, float | None]:
    """The model with an adapter, its rate where it is trained, and what the basis keeps of the task's first step."""
    if kind in LORAS:
        model = lora(model, LORAS[kind])
        return model, find_lr(model, trials_of(task), 4e-3, progress=False).lr, None
    if kind == OWN:
        model = patched(model, kind, r)
        lr: Any = lorasb.first_step_lr("auto", warmup_steps(WARMUP, TRAIN_STEPS))
        rate = lorasb.initialize(model, task.samples(), lr=lr, progress=False).rate or 0.0
        return model, refine_rate(model, trials_of(task), rate, progress=False).lr, 1.0
    if kind in (RANDOM, LORA_XS):
        model = patched(model, kind, r, init="random" if kind == RANDOM else "lora-xs-output")
    else:
        model = on_shared(model, kind, r)
    share = lorasb.basis_fit(model, task.samples(), progress=False).share
    return model, None if kind == MEAN else measured_rate(model, task), share


def run(name: str, kind: str, r: int, seed: int, factor: float, folder: Path | None) -> Row:
    """One run's row."""
    torch.manual_seed(seed)
    tokenizer, model = base()
    task = Task(name, seed, folder, tokenizer, model)
    before, share, rate = task.loss(model), None, None
    if kind != NONE:
        model, rate, share = adapted(kind, r, task, model)
    if rate is not None:
        rate *= factor
        train(model, task.batches(), rate)
    row: dict[str, Any] = {"task": name, "basis": kind, "r": r, "seed": seed, "factor": factor, "rate": rate}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if rate is not None else 0
    row |= {"loss": round(task.loss(model), 5), "loss_before": round(before, 5), "share": share, "trained": trained}
    row |= {"version": commit(), "machine": machine_name(dtype_name(measured_dtype())), "date": time.strftime("%F")}
    return {key: shown(value) for key, value in row.items()}


def shown(value: Any) -> str:
    """Format a value as in the rows."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ranks_of(rows: Sequence[Row]) -> list[int]:
    """The ranks of R that have runs."""
    return sorted({int(row["r"]) for row in rows if row["basis"] not in WITHOUT_RANK})


def runs(rows: Sequence[Row], task: str, kind: str, r: int) -> list[Row]:
    """Return a task's runs on a basis at the automatic rate; LoRAs have a fixed rank, whatever `r` is."""
    wanted = task, kind, str(WITHOUT_RANK.get(kind, r)), "1"
    return [row for row in rows if tuple(row[key] for key in ("task", "basis", "r", "factor")) == wanted]


def before(rows: Sequence[Row], task: str) -> float:
    """The held-out loss without an adapter, which every run of a task measures first."""
    return statistics.fmean(float(row["loss_before"]) for row in rows if row["task"] == task)


def by_task(rows: Sequence[Row], r: int) -> list[list[str]]:
    """The head and the lines of a rank's table: each task's loss without an adapter, and by basis."""
    tasks = [task for task in TASKS if any(runs(rows, task, kind, r) for kind in KINDS if kind not in WITHOUT_RANK)]
    kinds = [kind for kind in KINDS if kind != NONE and any(runs(rows, task, kind, r) for task in tasks)]
    body = [[task, f"{before(rows, task):.3f}", *(cell(runs(rows, task, kind, r)) for kind in kinds)] for task in tasks]
    return [["task", "no adapter", *kinds], *body]


def over_own(rows: Sequence[Row]) -> list[list[str]]:
    """Return the head and lines of the documentation's table, at small ranks: each task's losses relative to `own`'s.

    The last columns compare gains over the model without an adapter: R on the shared basis as a share of LoRA r = 1.
    Means are over the seeds that both have.
    """
    columns = [*((EIGHT, r) for r in SMALL), (TRAINED, SMALL[0]), (RANDOM, SMALL[0])]
    head = [f"{kind}, r={r}" for kind, r in columns] + [f"of {LORA}'s gain, r={r}" for r in SMALL]
    out = [["task", *head]]
    for task in TASKS:
        ratios = [_ratio(rows, task, (kind, r), (OWN, r)) for kind, r in columns]
        if any(ratios):
            gains = [_ratio(rows, task, (EIGHT, r), (LORA, 1), before(rows, task)) for r in SMALL]
            out.append([task, *(f"{x:.2f}x" if x else "" for x in ratios), *(f"{x:.0%}" if x else "" for x in gains)])
    return out


def _ratio(
    rows: Sequence[Row], task: str, one: tuple[str, int], other: tuple[str, int], start: float = 0.0
) -> float | None:
    """The mean ratio of two bases' losses, or of their gains from a loss `start`, over the seeds that both have."""
    above, below = ({row["seed"]: start - float(row["loss"]) for row in runs(rows, task, *key)} for key in (one, other))
    seeds = above.keys() & below.keys()
    return statistics.fmean(above[seed] / below[seed] for seed in seeds) if seeds else None


def cell(rows: Sequence[Row]) -> str:
    """Mean loss, the share of the first step that the basis keeps, and the seeds if several; empty without runs."""
    if not rows:
        return ""
    loss, kept = statistics.fmean(float(row["loss"]) for row in rows), rows[0]["share"]
    known = [f"{float(kept):.0%}"] if kept not in ("None", "1") else []
    known += [f"{len(rows)} seeds"] if len(rows) > 1 else []
    return f"{loss:.3f}" + (f" ({', '.join(known)})" if known else "")


Cell = tuple[str, str, int, int, float]  # as KEY


def cells(options: argparse.Namespace) -> list[Cell]:
    """The runs that the command line selects, first seeds first."""
    kinds = [(kind, r) for r in options.r for kind in options.basis]
    kinds = [(kind, WITHOUT_RANK.get(kind, r)) for kind, r in kinds]
    found = [
        (t, k, r, s, f) for s in range(options.seeds) for t in options.task for k, r in kinds for f in options.factor
    ]
    return list(dict.fromkeys(found))


def is_there(path: Path, cell: Cell) -> bool:
    """Whether the file of results, read again, has a run's row."""
    return list(map(shown, cell)) in [[row[key] for key in KEY] for row in read_csv(path)]


def main() -> None:
    """Run what is missing, or show what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(UNSEEN))
    parser.add_argument("--basis", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--r", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--factor", nargs="+", type=float, default=[1.0], help="times the automatic rate")
    parser.add_argument("--data-dir", type=Path, help="folder of arc_easy.*.jsonl, cola.* and gsm8k.*")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    use_dtype(options.dtype)
    torch.set_num_threads(options.threads)
    path, console = options.output / FILE, Console(width=160)
    asked = cells(options)
    for cell in () if options.table else asked:
        if is_there(path, cell):
            continue
        row = run(*cell, options.data_dir)
        if not is_there(path, cell):  # another process may have run it since
            append(path, row, list(row))
        console.print(" ".join(f"{key}={row[key]}" for key in (*KEY, "rate", "loss", "loss_before", "share")))
    found = read_csv(path)
    for r in ranks_of(found):
        head, *body = by_task(found, r)
        show(f"r = {r}: held-out loss (share of the task's first step that the basis keeps)", head, body, width=160)
    head, *body = over_own(found)
    show("loss relative to the task's own basis", head, body, width=160)
    missing = sum(not is_there(path, cell) for cell in asked)
    console.print(f"missing: {missing} of the {len(asked)} runs that the options select")


if __name__ == "__main__":
    main()
