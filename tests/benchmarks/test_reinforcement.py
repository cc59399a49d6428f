"""The comparison of GRPO by rank: which runs come next, and the table."""

from __future__ import annotations

from typing import Any

from benchmarks.training.reinforcement import ENTRIES, best_rate, lines, rates_to_try, wanted

ENTRY = ENTRIES["lora-sb-8"]


def row(lr: float, seed: int, after: float, **more: Any) -> dict[str, str]:
    values = {"entry": ENTRY.name, "lr": lr, "seed": seed, "before": 0.16, "after": after, "first_reward": 0.1}
    values |= {"last_reward": after, "trained": 13440, "bytes_a_step": 26880, "seconds": 100.0}
    return {name: str(value) for name, value in (values | more).items()}


def test_rates_go_outward_while_the_best_is_the_last() -> None:
    assert rates_to_try(ENTRY, {}) == [2.5e-3, 6.25e-4, 1e-2]
    tried = {6.25e-4: (0.2, 0.1), 2.5e-3: (0.3, 0.2), 1e-2: (0.4, 0.3)}
    assert rates_to_try(ENTRY, tried) == [4e-2]
    assert rates_to_try(ENTRY, tried | {4e-2: (0.0, 0.0)}) == []


def test_sweeps_come_first_and_seeds_at_the_best_rate() -> None:
    rows = [row(lr, 100, after) for lr, after in ((6.25e-4, 0.2), (2.5e-3, 0.3), (1e-2, 0.0))]
    assert best_rate(rows[:2], ENTRY) is None
    assert best_rate(rows, ENTRY) == 2.5e-3
    assert list(wanted([ENTRY], 2, rows)) == [(ENTRY, 2.5e-3, 0), (ENTRY, 2.5e-3, 1)]
    rows += [row(2.5e-3, seed, 0.3 + 0.1 * seed) for seed in (0, 1)]
    assert list(wanted([ENTRY], 2, rows)) == []
    (line,) = lines(rows)
    assert line[:5] == ["lora-sb-8", "13,440", "26.9 KB", "0.0025", "2"]
    assert line[6] == "35.0% ± 7.1%"
