"""The comparison of methods (benchmarks/research/methods) on a tiny Llama: a problem, cells, and models with a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from models import make, text

from benchmarks.research.methods import run
from benchmarks.research.methods.adapters import put_in
from benchmarks.research.methods.grid import METHODS, TASKS, Cell
from benchmarks.research.methods.problems import LINEARS, Batch, Problem

SHORT = replace(TASKS["chain_sum"], steps=4, batch=2)
R, ETA = 4, 1e-3


def problem(seen: list[tuple[int, ...]] | None = None, dtype: torch.dtype = torch.float32) -> Problem:
    """Forty rows; `seen` gets what is collated."""
    rows = text(40, 12, seed=5)

    def collate(indices: Sequence[int]) -> Batch:
        if seen is not None:
            seen.append(tuple(indices))
        return {key: value[list(indices)] for key, value in rows.items()}

    model = make("llama", dtype=dtype)
    return Problem(model, list(range(40)), collate, lambda *_: (0.0, 0.0), lambda *_: 0.0, LINEARS, [], "CAUSAL_LM")


def cell_of(method: str = "LoRA-SB", r: int = R, **options: Any) -> Cell:
    """A run, a variant if it has options."""
    variant = "a variant" if options else ""
    return Cell(SHORT.name, "test", method, r, ETA, 0, variant, tuple(sorted(options.items())))


def put(one: Problem, asked: Cell) -> Any:
    """The problem's model with the cell's method in it."""
    return put_in(one, METHODS[asked.method], asked, lambda count: run.drawn(one, SHORT, 0, count), 1)[0]
