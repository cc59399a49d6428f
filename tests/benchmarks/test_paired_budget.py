"""What the runs took and what is missing of the grid, and the machines that a table names by letters."""

from __future__ import annotations

import pytest
from paired_rows import TASK, row, swept

from benchmarks.research.methods.grid import task_named
from benchmarks.research.paired.budget import COMPARED, bills, missing
from benchmarks.research.paired.compare import lines, machines, shown_loss
from benchmarks.research.paired.grid import FIXED, LORA, RANKS, SEEDS
from benchmarks.research.reporting import paired

ALL = len(COMPARED) * len(SEEDS)


def test_missing_runs_are_the_seeds_and_the_sweeps_that_nobody_ran() -> None:
    swept_entries = len(COMPARED) - 2  # FIXED has no sweep, and LoRA one rank only
    a_rank = (len(COMPARED) - 1) * len(SEEDS) + 3 * swept_entries
    assert missing([], "chain_sum") == len(RANKS) * a_rank + 3 + len(SEEDS)
    done = [*swept("sign", 16), *(row("sign", 16, 4e-3, seed, 0.3) for seed in (0, 1))]
    assert missing(done, "chain_sum") == missing([], "chain_sum") - 3 - 2
    assert missing(done, "chain_sum, 300 steps") == ALL  # one rank, and the short runs' rates


def test_hours_are_the_rows_and_longer_runs_cost_by_their_steps() -> None:
    rows = [row("sign", 16, 4e-3, 0, 0.3), row("sign", 16, 4e-3, 1, 0.3) | {"seconds": "110"}]
    found = {one.task: one for one in bills(rows)}
    assert set(found) == {"chain_sum", "chain_sum, 300 steps", "chain_sum, 1200 steps"}
    short, longer = found["chain_sum"], found["chain_sum, 300 steps"]
    assert (short.runs, short.seconds, short.hours) == (2, 100.0, pytest.approx(200 / 3600))
    assert longer.seconds == 100.0 * task_named("chain_sum, 300 steps by loss").steps / task_named(TASK).steps
    assert longer.rest == pytest.approx(ALL * longer.seconds / 3600)
    text = "\n".join(paired.what_runs_took(rows))
    assert "Those below took 0.1" in text
    assert list(paired.what_runs_took([])) == []


def test_a_letter_says_which_machine_ran_an_entry() -> None:
    rows = [*swept("sign", 16), row("sign", 16, 4e-3, 0, 0.3), row("sign", 16, 4e-3, 1, 0.3) | {"machine": "Z"}]
    rows += [row(FIXED, 16, 2e-3, seed, 0.4) for seed in (0, 1)]
    assert machines(rows) == {"Z": "A", "a machine": "B"}
    shown = {line[1]: line[4] for line in lines(rows, TASK, "sign")}
    assert shown == {"sign": "A B", FIXED: "B"}
    text = "\n".join(paired.one_task([one | {"version": "1", "date": "today"} for one in rows], "chain_sum"))
    assert "A: Z; B: a machine" in text
    assert LORA not in shown


def test_a_seed_that_ended_far_off_is_named() -> None:
    assert shown_loss({0: 0.1, 1: 0.12, 2: 0.11}) == "0.1100"
    assert shown_loss({0: 0.1, 2: 4.9, 1: 0.1}) == "1.7000 (seed 2: 4.9000)"
