"""Length of the whole first step of full fine-tuning, in AdamW steps of R.

With η equal to the rate of R's first step, that step moves R by η·‖Σ_r‖ (s = 1) and an AdamW step by η·r. Their ratio,
‖Σ_r‖/r for the sum of signs, depends on the model and the samples, not on the rate. `initialize(longest_start=...)`
limits it to 4. Initializes SmolLM2-135M on chain_sum at each rank (seconds each) and trains nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.csv_files import write_csv
from benchmarks.common.tables import show
from benchmarks.common.timing import measured_dtype, provenance_columns
from benchmarks.research.methods.adapters import put_in
from benchmarks.research.methods.grid import METHODS, TASKS, Cell
from benchmarks.research.methods.problems import load
from benchmarks.research.methods.run import drawn

TASK, SEED, FILE = TASKS["chain_sum"], 0, "lengths.csv"
HEAD = ("r", "layers", "median layer", "shortest", "longest")


def lengths(shares: Sequence[float]) -> dict[str, Any]:
    """Summarize lengths before shortening, given each layer's share of η after shortening to one step of R."""
    steps = [1.0 / share for share in shares]
    return {"layers": len(steps), "median": statistics.median(steps), "least": min(steps), "most": max(steps)}


def measure(r: int) -> dict[str, Any]:
    """Measure one rank; lengths below one step of R count as one."""
    problem = load(TASK, None, measured_dtype())
    cell = Cell(TASK.name, "validation", "LoRA-SB", r, 1e-3, SEED, options=(("longest_start", 1.0),))
    _, _, report = put_in(problem, METHODS["LoRA-SB"], cell, lambda n: drawn(problem, TASK, SEED, n), 0)
    return {"task": TASK.name, "r": r, **lengths([layer.start for layer in report.layers])}


def shown(line: Mapping[str, Any]) -> list[str]:
    """For people, under `HEAD`."""
    steps = (f"{float(line[name]):.1f}" for name in ("median", "least", "most"))
    return [str(line["r"]), str(line["layers"]), *steps]


def main(output: Path) -> None:
    """Measure, write and print."""
    lines = [measure(r) | provenance_columns() for r in TASK.ranks]
    write_csv(output / FILE, lines)
    title = f"The whole first step in AdamW's steps of R, {TASK.name}, {TASK.model}"
    show(title, HEAD, map(shown, lines))
