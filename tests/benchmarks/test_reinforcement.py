"""The comparison of GRPO by rank: which runs come next, and the table."""

from __future__ import annotations

from typing import Any

from benchmarks.training.reinforcement import ENTRIES, best_rate, lines, rates_to_try, wanted

ENTRY = ENTRIES["lora-sb-8"]


def row(lr: float, seed: int, chance: float, **more: Any) -> dict[str, str]:
    values = {"entry": ENTRY.name, "lr": lr, "seed": seed, "chance_before": 0.2, "chance": chance, "step_seconds": 4.0}
    values |= {"greedy_before": 0.3, "greedy": chance, "trained": 13440, "bytes_a_step": 26880}
    return {name: str(value) for name, value in (values | more).items()}


def test_rates_go_outward_while_the_best_is_the_last() -> None:
    assert rates_to_try(ENTRY, {}) == [6.25e-4, 1.56e-4, 2.5e-3]
    tried = {1.56e-4: 0.2, 6.25e-4: 0.3, 2.5e-3: 0.4}
    assert rates_to_try(ENTRY, tried) == [1e-2]
    assert rates_to_try(ENTRY, tried | {1e-2: 0.0}) == []


def test_sweeps_come_first_and_seeds_at_the_best_rate() -> None:
    rows = [row(lr, 100, chance) for lr, chance in ((1.56e-4, 0.2), (6.25e-4, 0.3), (2.5e-3, 0.0))]
    assert best_rate(rows[:2], ENTRY) is None
    assert best_rate(rows, ENTRY) == 6.25e-4
    assert list(wanted([ENTRY], 2, rows)) == [(ENTRY, 6.25e-4, 0), (ENTRY, 6.25e-4, 1)]
    rows += [row(6.25e-4, seed, 0.3 + 0.1 * seed) for seed in (0, 1)]
    assert list(wanted([ENTRY], 2, rows)) == []
    (line,) = lines(rows)
    assert line[:5] == ["lora-sb-8", "13,440", "26.9 KB", "0.000625", "2"]
    assert line[5:] == ["35.0%", "+15.0 ± 7.1", "35.0%", "+5.0 ± 7.1", "4.0"]


def test_other_starts_take_the_rate_of_the_first() -> None:
    other = ENTRIES["lora-sb-8, zero"]
    assert {(entry, lr) for entry, lr, _ in wanted([other], 1, [])} == {(ENTRY, lr) for lr in rates_to_try(ENTRY, {})}
    rows = [row(lr, 100, chance) for lr, chance in ((1.56e-4, 0.2), (6.25e-4, 0.3), (2.5e-3, 0.0))]
    assert list(wanted([other], 1, rows)) == [(other, 6.25e-4, 0)]
