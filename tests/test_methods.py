"""The comparison of methods: its grid, its rows, its scores, and Table 8's counts; no model is trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.methods import grid, rows, tables
from benchmarks.methods.grid import METHODS, TASKS, Cell
from benchmarks.methods.problems import matthews
from benchmarks.paper import costs

TASK = TASKS["chain_sum"]


def row(cell: Cell, loss: float) -> dict[str, object]:
    return {**cell.described(), "loss": loss, "score": 1 - loss, "adapter_params": 9, "seconds": 2, "init_seconds": 1, "peak_rss_mb": 3}  # fmt: skip


def test_every_method_gets_as_many_rates_and_seeds() -> None:
    for task in TASKS.values():
        assert len({len(rates) for rates in task.rates.values()}) == 1
        assert all(len(rates) >= 3 for rates in task.rates.values())
        cells = [list(grid.sweep(task, method)) for method in METHODS.values()]
        assert all(len(part) % len(task.rates[grid.LOW]) == 0 for part in cells)
        assert len({cell.key for part in cells for cell in part}) == sum(map(len, cells))


def test_seeds_run_at_the_best_rate_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    path, method = tmp_path / "rows.csv", METHODS["LoRA"]
    sweep = list(grid.sweep(TASK, method))
    for cell, loss in zip(sweep[:-1], (0.5, 0.3, 0.4), strict=True):
        rows.append(path, row(cell, loss))
    assert rows.missing(sweep, rows.read(path)) == sweep[-1:]
    assert list(grid.finals(TASK, method, rows.read(path))) == []
    rows.append(path, row(sweep[-1], 0.6))
    finals = list(grid.finals(TASK, method, rows.read(path)))
    assert {cell.lr for cell in finals} == {TASK.rates[grid.LOW][1]}
    assert [cell.seed for cell in finals] == list(grid.SEEDS)
    for cell, loss in zip(finals, (0.1, 0.2, 0.3), strict=True):
        rows.append(path, row(cell, loss))
    stale = Cell(TASK.name, "test", "LoRA", TASK.rank, TASK.rates[grid.LOW][0], 0)
    rows.append(path, row(stale, 9.0))  # of a sweep that has grown since
    assert rows.missing(finals, rows.read(path)) == []
    (line,) = tables.lines(rows.read(path), TASK.name)
    assert line.loss == pytest.approx((0.2, 0.1))
    assert [table.row_count for table in tables.summary(rows.read(path))] == [1]


def test_curves_are_means_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    cell = next(grid.sweep(TASK, METHODS["LoRA"]))
    rows.append_curve(path, {**cell.described(), "losses": [1.0, 3.0, 2.0, 4.0, 5.0]}, points=3)
    assert '"losses": [2.0, 3.0, 5.0]' in path.read_text(encoding="utf-8")


def test_matthews_correlation() -> None:
    labels = torch.tensor([1, 1, 1, 0, 0, 1, 0, 1])
    assert matthews(labels, labels) == pytest.approx(1)
    assert matthews(1 - labels, labels) == pytest.approx(-1)
    assert matthews(torch.ones(8), labels) == 0.0
    guesses = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1])  # 4 right of 1, 2 of 0, one wrong of each
    assert matthews(guesses, labels) == pytest.approx((4 * 2 - 1 * 1) / (5 * 3 * 5 * 3) ** 0.5)


def test_table_8s_figures() -> None:
    """Within one unit of their last digit, or with a reason."""
    found = costs.rows()
    apart = [(row["model"], row["r"]) for row in found if not row["within_a_digit"]]
    assert apart == [("RoBERTa-large", 24), ("Gemma-2 9B", 32), ("Gemma-2 9B", 64), ("Gemma-2 9B", 96)]
    assert all(row["note"] for row in found if not row["within_a_digit"])
    roberta = next(row for row in found if (row["model"], row["r"]) == ("RoBERTa-large", 24))
    assert (roberta["macs"] - 24 * 24 * 96 * costs.TOKENS) / 1e9 == pytest.approx(78.97, abs=0.005)
