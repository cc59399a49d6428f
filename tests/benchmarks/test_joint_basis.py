"""The comparison of a joint basis with own ones: what is run, and the table of what was found."""

from __future__ import annotations

from typing import Any

from benchmarks.research.methods.grid import BY_SCORE
from benchmarks.serving.joint_basis import JOINT, OWN, lines, wanted

TASK = "gcd by score"


def row(entry: str, split: str, lr: float, seed: int, loss: float, r: int = 16, **more: Any) -> dict[str, str]:
    values = {
        "task": TASK,
        "split": split,
        "variant": entry,
        "r": r,
        "lr": lr,
        "seed": seed,
        "loss": loss,
        "score": 0.5,
    }
    return {name: str(value) for name, value in (values | {"energy": 0.75} | more).items()}


def swept() -> list[dict[str, str]]:
    return [row(OWN.name, "validation", lr, 100, loss) for lr, loss in ((2e-3, 0.5), (4e-3, 0.3), (8e-3, 0.4))]


def test_both_are_run_at_the_rate_that_is_best_on_an_own_basis() -> None:
    first = [cell for cell in wanted([16], []) if cell.task == TASK]
    assert {(cell.variant, cell.split, cell.lr) for cell in first} == {
        (OWN.name, "validation", lr) for lr in (2e-3, 4e-3, 8e-3)
    }
    assert len(wanted([16], [])) == 3 * len(BY_SCORE)
    then = [cell for cell in wanted([16], swept()) if cell.task == TASK]
    assert {(cell.variant, cell.lr, cell.seed) for cell in then} == {
        (e.name, 4e-3, s) for e in (OWN, JOINT) for s in range(3)
    }
    assert dict(then[-1].options) == {"joint": True}


def test_the_table_pairs_seeds() -> None:
    rows = swept()
    for seed in range(3):
        rows += [
            row(OWN.name, "test", 4e-3, seed, 0.3 + 0.1 * seed),
            row(JOINT.name, "test", 4e-3, seed, 0.4 + 0.1 * seed),
        ]
    rows.append(row(JOINT.name, "test", 4e-3, 3, 9.0))  # no partner
    (line,) = lines(rows)
    assert line[:3] == ["gcd", "16", "3"]
    assert line[3].startswith("0.4000 ± 0.1000")
    assert line[5] == "+0.1000 ± 0.0000"
    assert line[-1] == "75%"
