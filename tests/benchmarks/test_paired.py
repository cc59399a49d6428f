"""Paired runs: sweeps from the rule's rates outward, seeds at the best rate, and paired intervals."""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from compared_methods import paired_row

from benchmarks.common.csv_files import Row
from benchmarks.research.methods.grid import LONGER, task_named
from benchmarks.research.paired import compare, grid
from benchmarks.research.paired.compare import Difference, difference, final_losses, half_width
from benchmarks.research.paired.grid import Entry, entries, wanted
from benchmarks.research.reporting import paired

TASK = "chain_sum by loss"
SIGN = entries()["sign"]
row = partial(paired_row, TASK)


def swept(entry: str, r: int, best: int = 0) -> list[Row]:
    """A sweep whose best rate is the rule's, times two to the power `best`."""
    rates = {p: entries()[entry].at(r, p) for p in range(-1, max(1, best) + 1)}
    losses = {lr: 0.3 + 0.01 * abs(p - best) for p, lr in rates.items()}
    return [row(entry, r, lr, grid.SWEEP_SEED, loss, "validation") for lr, loss in losses.items()]


def seeds(entry: str, losses: Sequence[float], first: int = 0) -> list[Row]:
    """Runs with consecutive seeds, at the best rate."""
    one = entries()[entry]
    return [row(entry, one.rank(16), one.at(16, 0), seed, loss) for seed, loss in enumerate(losses, first)]


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
    assert entry.rates(r).start == pytest.approx((expected / 2, expected, 2 * expected))


def test_a_rate_at_the_end_of_the_ladder_is_marked() -> None:
    ended = grid.shown_rate(SIGN, 16, swept("sign", 16, grid.FARTHEST), TASK)
    assert ended == f"{SIGN.at(16, grid.FARTHEST):g} (last tried)"
    assert grid.shown_rate(SIGN, 16, swept("sign", 16), TASK) == "0.004"


def test_seeds_wait_for_the_sweep() -> None:
    asked = wanted(["chain_sum"], ["sign"], [16], [0, 1], [])
    assert {cell.split for cell in asked} == {"validation"}
    asked = wanted(["chain_sum"], ["sign"], [16], [0, 1], swept("sign", 16))
    assert [(cell.split, cell.seed, cell.lr) for cell in asked] == [("test", 0, 4e-3), ("test", 1, 4e-3)]
    assert {cell.variant for cell in asked} == {"sign"}
    not_swept = wanted(["chain_sum"], [grid.FOUND, grid.FIXED], [4, 64], [0], [])
    assert {(cell.split, cell.lr) for cell in not_swept} == {("test", 2e-3)}


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
    """Eight pairs: t with seven degrees of freedom is 2.365."""
    mine = [0.30, 0.31, 0.29, 0.33, 0.28, 0.30, 0.32, 0.29]
    theirs = [0.32, 0.32, 0.32, 0.34, 0.31, 0.31, 0.33, 0.32]
    rows = [*swept("random", 16), *swept("sign", 16), *seeds("random", mine), *seeds("sign", theirs)]
    found = difference(rows, TASK, 16, "random", "sign")
    pairs = [a - b for a, b in zip(mine, theirs, strict=True)]
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(pairs))
    assert found.half == pytest.approx(2.365 * statistics.stdev(pairs) / math.sqrt(8))
    assert (found.verdict, found.seeds) == ("better", 8)


def test_only_seeds_that_both_have_count_and_only_at_the_best_rate() -> None:
    rows = [*swept("random", 16), *swept("sign", 16), *seeds("random", [0.3] * 3), *seeds("sign", [0.3] * 3, first=1)]
    rows += [row("random", 16, 8e-3, 3, 0.1)]
    assert sorted(final_losses(rows, TASK, "random", 16)) == [0, 1, 2]
    found = difference(rows, TASK, 16, "random", "sign")
    assert found is not None
    assert (found.seeds, found.mean, found.verdict) == (2, 0.0, "tie")
    assert difference(rows, TASK, 4, "random", "sign") is None


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (-0.02, 0.01, "better"),
        (0.02, 0.01, "worse"),
        (0.005, 0.01, "tie"),
        (math.nan, math.inf, "diverged"),
        (-math.inf, math.inf, "better"),  # the other's loss is not finite
    ],
)
def test_verdicts_are_the_intervals(mean: float, half: float, verdict: str) -> None:
    assert Difference(mean, half, 8, 0.3).verdict == verdict
    assert half_width([0.1]) == half_width([0.1, math.nan]) == math.inf  # one seed gives no interval
    assert str(Difference(0.1, half_width([0.1]), 1, 0.3)) == "+0.1000 (one seed)"


def test_an_entry_of_its_own_rank_is_held_against_every_rank() -> None:
    asked = wanted(["chain_sum"], [grid.LORA], [4, 64], [0], [])
    assert {cell.r for cell in asked} == {32}
    rows = [*swept("sign", 16), *swept(grid.LORA, 32), *seeds("sign", [0.3] * 2), *seeds(grid.LORA, [0.25] * 2)]
    found = difference(rows, TASK, 16, "sign", grid.LORA)
    assert found is not None
    assert (found.seeds, round(found.mean, 9), found.base) == (2, 0.05, 0.25)


def test_spots_are_means_over_each_entrys_own_seeds_with_their_interval(tmp_path: Path) -> None:
    """Three seeds: t with two degrees of freedom is 4.303. The table also compares on the seeds that all share."""
    rows = [*swept("sign", 16), *seeds("sign", [0.3, 1.3, 2.3]), *swept("LoRA r=3", 3), *seeds("LoRA r=3", [0.2, 1.2])]
    found = {spot.name: spot for spot in compare.spots_of(rows, TASK)}
    assert {name: (spot.r, round(spot.loss, 9)) for name, spot in found.items()} == {
        "sign": (16, 1.3),
        "LoRA r=3": (3, 0.7),
    }
    assert found["sign"].bar == found["sign"].half == pytest.approx(4.303 / math.sqrt(3))
    assert found["LoRA r=3"].bar == 0.5  # half of the range, for two seeds
    lines = list(paired.by_parameters(rows, tmp_path))
    assert "| chain_sum | LoRA r=3 | 3 | 256 | 0.7000 ± 6.3530 | 2 | 0.7000 (2) |" in lines
    assert "| chain_sum | sign | 16 | 256 | 1.3000 ± 2.4843 | 3 | 0.8000 (2) |" in lines
    assert (tmp_path / paired.PICTURE).is_file()


def test_a_seed_far_above_the_others_is_named_and_not_in_the_mean() -> None:
    rows = [*swept("LoRA-XS", 16), *seeds("LoRA-XS", [0.3, 0.5, 0.4, 4.9, math.nan])]
    (spot,) = compare.spots_of(rows, TASK)
    assert (round(spot.loss, 9), spot.left_out) == (0.4, {3: 4.9, 4: math.inf})
    assert str(spot).endswith("(seed 3: 4.9000, seed 4: inf)")


def test_the_measured_rate_in_another_setting_is_compared_with_the_sweep_in_that_setting() -> None:
    plain, measured = (f"{name}, 4 bits" for name in (grid.PLAIN, grid.MEASURED))
    asked = wanted(["chain_sum"], [plain], [16], [0], swept("sign", 16))
    assert {cell.split for cell in asked} == {"validation"}  # the sweep in the task's own setting does not count
    assert {dict(cell.options)["four_bits"] for cell in asked} == {True}
    rows = [*swept(plain, 16), *seeds(plain, [0.30, 0.32]), *swept("sign", 16), *seeds("sign", [0.2])]
    found = [row(measured, 16, 2e-3, seed, loss) | {"found_lr": "0.008"} for seed, loss in enumerate((0.31, 0.33))]
    there = [one | {"machine": "a machine"} for one in (*rows, *found)]
    assert [line[1] for line in compare.lines(there, TASK, "sign")] == ["sign"]
