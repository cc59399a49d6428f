"""Helpers for benchmarks/research: a problem with a tiny Llama, cells, models with a method, and result rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from models import make, text

from benchmarks.common.csv_files import Row
from benchmarks.research.methods import run
from benchmarks.research.methods.adapters import put_in
from benchmarks.research.methods.grid import METHODS, TASKS, Cell
from benchmarks.research.methods.problems import LINEARS, Batch, Problem

SHORT = replace(TASKS["chain_sum"], steps=4, batch=2)
R, ETA = 4, 1e-3


def problem(seen: list[tuple[int, ...]] | None = None, dtype: torch.dtype = torch.float32) -> Problem:
    """A problem of forty rows; `seen` collects the indices of each batch."""
    rows = text(40, 12, seed=5)

    def collate(indices: Sequence[int]) -> Batch:
        if seen is not None:
            seen.append(tuple(indices))
        return {key: value[list(indices)] for key, value in rows.items()}

    model = make("llama", dtype=dtype)
    return Problem(model, list(range(40)), collate, lambda *_: (0.0, 0.0), lambda *_: 0.0, LINEARS, [], "CAUSAL_LM")


def cell_of(method: str = "LoRA-SB", r: int = R, **options: Any) -> Cell:
    """The cell of a run; with options, of a variant."""
    variant = "a variant" if options else ""
    return Cell(SHORT.name, "test", method, r, ETA, 0, variant, tuple(sorted(options.items())))


def put(one: Problem, asked: Cell) -> Any:
    """The problem's model with the cell's method in it."""
    return put_in(one, METHODS[asked.method], asked, lambda count: run.drawn(one, SHORT, 0, count), 1)[0]


def row(cell: Cell, loss: float) -> dict[str, Any]:
    """A result row of the comparison of methods."""
    found = {"loss": loss, "score": 1 - loss, "loss_before": 2, "energy_grad": 0.4, "steps": 75}
    took = {"adapter_params": 100 * cell.r, "seconds": 2, "init_seconds": 1, "peak_rss_mb": 3}
    return {**cell.described(), **found, **took, "version": "abc1234", "machine": "a machine", "date": "2026-01-01"}


def paired_row(task: str, entry: str, r: int, lr: float, seed: int, loss: float, split: str = "test") -> Row:
    """A result row of the paired comparison."""
    given = {"task": task, "variant": entry, "r": r, "lr": lr, "seed": seed, "loss": loss, "split": split}
    values = given | {"adapter_params": 256, "score": 0.5, "energy": 0.75}
    return {name: str(value) for name, value in values.items()}
