"""Pairs of runs: rates by rule and outward, seeds at the best of them, and intervals of paired differences."""

from __future__ import annotations

import math
import statistics

import pytest
from paired_rows import TASK, row, swept

from benchmarks.research.methods.grid import LONGER, task_named
from benchmarks.research.paired import grid
from benchmarks.research.paired.compare import Difference, difference, final_losses, half_width
from benchmarks.research.paired.grid import Entry, best_rate, entries, rates_to_try, wanted
from benchmarks.research.reporting import paired


def test_every_task_judges_a_thousand_examples_by_loss() -> None:
    for name in (*grid.CHOOSING, *grid.HELD_BACK):
        task = task_named(f"{name} by loss")
        assert task.test >= 1000
        assert not task.higher_is_better
        assert task.name == name
    assert len(grid.SEEDS) >= 8
    assert grid.SWEEP_SEED not in grid.SEEDS


@pytest.mark.parametrize(
    ("falls", "r", "expected"), [(0.5, 64, 2e-3), (0.5, 4, 8e-3), (1.0, 64, 1e-3), (0.0, 64, 4e-3)]
)
def test_rates_follow_the_rank(falls: float, r: int, expected: float) -> None:
    entry = Entry("an entry", "LoRA-SB", falls=falls)
    assert entry.rates(r) == pytest.approx((expected / 2, expected, 2 * expected))


def test_a_sweep_goes_outward_while_the_best_is_at_its_end() -> None:
    entry = entries()["sign"]
    low, middle, high = entry.rates(16)
    assert rates_to_try(entry, 16, {}) == (low, middle, high)
    assert rates_to_try(entry, 16, {low: 0.3, high: 0.3}) == (middle,)
    assert rates_to_try(entry, 16, {low: 0.4, middle: 0.3, high: 0.4}) == ()
    assert rates_to_try(entry, 16, {low: 0.4, middle: 0.3, high: 0.2}) == (entry.at(16, 2),)
    assert rates_to_try(entry, 16, {low: 0.2, middle: 0.3, high: 0.4}) == (entry.at(16, -2),)
    assert best_rate(entry, 16, {low: 0.4, middle: 0.3, high: 0.4}) == middle
    assert best_rate(entry, 16, {low: 0.2, middle: 0.3, high: 0.4}) is None


def test_seeds_wait_for_the_sweep() -> None:
    asked = wanted(["chain_sum"], ["sign"], [16], [0, 1], [])
    assert {cell.split for cell in asked} == {"validation"}
    asked = wanted(["chain_sum"], ["sign"], [16], [0, 1], swept("sign", 16))
    assert [(cell.split, cell.seed, cell.lr) for cell in asked] == [("test", 0, 4e-3), ("test", 1, 4e-3)]
    assert {cell.variant for cell in asked} == {"sign"}


def test_longer_runs_take_the_short_sweep_and_examples_that_no_step_has_seen() -> None:
    for name, (short, _) in LONGER.items():
        longer, base = task_named(f"{name} by loss"), task_named(f"{short} by loss")
        assert (longer.batch, longer.test, longer.targets) == (base.batch, base.test, base.targets)
        assert longer.steps > base.steps
        assert "epochs" in name or longer.examples == longer.steps * longer.batch
    asked = wanted(["chain_sum, 300 steps"], ["sign"], [16], [0], [])
    assert {(cell.task, cell.split) for cell in asked} == {(TASK, "validation")}
    (asked_now,) = wanted(["chain_sum, 300 steps"], ["sign"], [16], [0], swept("sign", 16))
    assert (asked_now.task, asked_now.split, asked_now.lr) == ("chain_sum, 300 steps by loss", "test", 4e-3)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    """Eight pairs: t of seven degrees of freedom, 2.365."""
    mine = [0.30, 0.31, 0.29, 0.33, 0.28, 0.30, 0.32, 0.29]
    theirs = [0.32, 0.32, 0.32, 0.34, 0.31, 0.31, 0.33, 0.32]
    rows = [*swept("random", 16), *swept("sign", 16)]
    for name, losses in (("random", mine), ("sign", theirs)):
        rows += [row(name, 16, 4e-3, seed, loss) for seed, loss in enumerate(losses)]
    found = difference(rows, TASK, 16, "random", "sign")
    pairs = [a - b for a, b in zip(mine, theirs, strict=True)]
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(pairs))
    assert found.half == pytest.approx(2.365 * statistics.stdev(pairs) / math.sqrt(8))
    assert (found.verdict, found.seeds) == ("better", 8)


def test_only_seeds_that_both_have_count_and_only_at_the_best_rate() -> None:
    rows = [*swept("random", 16), *swept("sign", 16)]
    rows += [row("random", 16, 4e-3, seed, 0.3) for seed in (0, 1, 2)] + [row("random", 16, 8e-3, 3, 0.1)]
    rows += [row("sign", 16, 4e-3, seed, 0.3) for seed in (1, 2, 3)]
    assert sorted(final_losses(rows, TASK, "random", 16)) == [0, 1, 2]
    found = difference(rows, TASK, 16, "random", "sign")
    assert found is not None
    assert (found.seeds, found.mean, found.verdict) == (2, 0.0, "tie")
    assert difference(rows, TASK, 4, "random", "sign") is None


@pytest.mark.parametrize(
    ("mean", "half", "verdict"), [(-0.02, 0.01, "better"), (0.02, 0.01, "worse"), (0.005, 0.01, "tie")]
)
def test_verdicts_are_the_intervals(mean: float, half: float, verdict: str) -> None:
    assert Difference(TASK, 16, "a", "b", mean, half, 8, 0.3).verdict == verdict


def test_one_seed_says_nothing_and_a_loss_that_is_none_says_so() -> None:
    assert half_width([0.1]) == math.inf
    assert half_width([0.1, math.nan]) == math.inf
    assert Difference(TASK, 16, "a", "b", math.nan, math.inf, 2, 0.3).verdict == "diverged"


@pytest.mark.parametrize("order", [(-1, 0, 1), (1, 0, -1)])
def test_a_rate_that_diverged_is_never_the_best(order: tuple[int, ...]) -> None:
    entry = entries()["sign"]
    losses = {-1: 0.31, 0: 0.30, 1: math.nan}
    assert best_rate(entry, 16, {entry.at(16, power): losses[power] for power in order}) == entry.at(16, 0)


def test_rates_beside_the_ladder_do_not_count() -> None:
    entry = entries()["sign"]
    tried = {entry.at(16, power): loss for power, loss in ((-1, 0.31), (0, 0.30), (1, 0.32))}
    assert best_rate(entry, 16, tried | {0.0031: 0.1}) == entry.at(16, 0)


def test_a_table_says_where_a_ladder_ended() -> None:
    entry = entries()["sign"]
    rising = [
        row("sign", 16, entry.at(16, p), grid.SWEEP_SEED, 0.5 - 0.01 * p, "validation")
        for p in range(-1, grid.FARTHEST + 1)
    ]
    assert grid.shown_rate(entry, 16, rising, TASK) == f"{entry.at(16, grid.FARTHEST):g} (last tried)"
    assert grid.shown_rate(entry, 16, swept("sign", 16), TASK) == "0.004"


def test_an_entry_of_its_own_rank_is_held_against_every_rank() -> None:
    lora = entries()[grid.LORA]
    asked = wanted(["chain_sum"], [grid.LORA], [4, 64], [0], [])
    assert {cell.r for cell in asked} == {32}
    rows = [
        *swept("sign", 16),
        *(row(grid.LORA, 32, lora.at(32, p), grid.SWEEP_SEED, abs(p) + 0.3, "validation") for p in (-1, 0, 1)),
    ]
    rows += [row("sign", 16, 4e-3, seed, 0.3) for seed in (0, 1)] + [
        row(grid.LORA, 32, 2e-3, seed, 0.25) for seed in (0, 1)
    ]
    found = difference(rows, TASK, 16, "sign", grid.LORA)
    assert found is not None
    assert (found.seeds, round(found.mean, 9), found.base) == (2, 0.05, 0.25)


def test_found_rates_are_held_against_the_default_one_and_the_best() -> None:
    rows = [*swept("sign", 16), *(row("sign", 16, 4e-3, seed, 0.30) for seed in (0, 1))]
    rows += [row(grid.FIXED, 16, 2e-3, seed, 0.40) for seed in (0, 1)]
    rows += [row(grid.FOUND, 16, 2e-3, seed, 0.32) | {"found_lr": str(rate)} for seed, rate in ((0, 4e-3), (1, 8e-3))]
    (line,) = [text for text in paired.rates(rows) if text.startswith("| chain_sum")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "chain_sum",
        "16",
        "0.4000",
        "0.3200",
        "0.004 to 0.008",
        "-0.0800 ± 0.0000 (better)",
        "0.3000",
        "+0.0200 ± 0.0000 (worse)",
    ]
    assert list(paired.rates(swept("sign", 16))) == []


def test_a_rate_that_is_not_swept_is_never_tried_on_the_validation_split() -> None:
    asked = wanted(["chain_sum"], [grid.FOUND, grid.FIXED], [4, 64], [0], [])
    assert {(cell.split, cell.lr) for cell in asked} == {("test", 2e-3)}
