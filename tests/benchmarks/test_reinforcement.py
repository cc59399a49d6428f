"""Which runs come next, for GRPO by rank and for a joint basis."""

from functools import partial

from compared_methods import paired_row

from benchmarks.research import joint_basis
from benchmarks.research.joint_basis import JOINT, OWN
from benchmarks.research.methods.grid import BY_SCORE
from benchmarks.research.reinforcement import ENTRIES, best_rate, wanted

ENTRY = ENTRIES["lora-sb-8"]


def row(lr: float, seed: int, chance: float) -> dict[str, str]:
    return {"entry": ENTRY.name, "lr": str(lr), "seed": str(seed), "chance": str(chance)}


SWEPT = [row(lr, 100, chance) for lr, chance in ((1.56e-4, 0.2), (6.25e-4, 0.3), (2.5e-3, 0.0))]


def test_sweeps_come_first_and_seeds_at_the_best_rate() -> None:
    assert best_rate(SWEPT[:2], ENTRY) is None
    assert best_rate(SWEPT, ENTRY) == 6.25e-4
    assert list(wanted([ENTRY], 2, SWEPT)) == [(ENTRY, 6.25e-4, 0), (ENTRY, 6.25e-4, 1)]
    assert list(wanted([ENTRY], 2, SWEPT + [row(6.25e-4, seed, 0.3) for seed in (0, 1)])) == []


def test_other_starts_take_the_rate_of_the_first() -> None:
    other = ENTRIES["lora-sb-8, zero"]
    assert {(entry, lr) for entry, lr, _ in wanted([other], 1, [])} == {(ENTRY, lr) for lr in ENTRY.rates.start}
    assert list(wanted([other], 1, SWEPT)) == [(other, 6.25e-4, 0)]


TASK = "gcd by score"
own_row = partial(paired_row, TASK)
OWN_SWEPT = [own_row(OWN.name, 16, lr, 100, loss, "validation") for lr, loss in ((2e-3, 0.5), (4e-3, 0.3), (8e-3, 0.4))]


def test_both_are_run_at_the_rate_that_is_best_on_an_own_basis() -> None:
    first = [cell for cell in joint_basis.wanted([16], []) if cell.task == TASK]
    assert {(cell.variant, cell.split, cell.lr) for cell in first} == {
        (OWN.name, "validation", lr) for lr in (2e-3, 4e-3, 8e-3)
    }
    assert len(joint_basis.wanted([16], [])) == 3 * len(BY_SCORE)
    then = [cell for cell in joint_basis.wanted([16], OWN_SWEPT) if cell.task == TASK]
    assert {(cell.variant, cell.lr, cell.seed) for cell in then} == {
        (e.name, 4e-3, s) for e in (OWN, JOINT) for s in range(3)
    }
    assert dict(then[-1].options) == {"joint": True}


def test_the_table_pairs_seeds() -> None:
    rows = [*OWN_SWEPT, own_row(JOINT.name, 16, 4e-3, 3, 9.0)]  # no partner
    for seed in range(3):
        rows += [own_row(e.name, 16, 4e-3, seed, start + 0.1 * seed) for e, start in ((OWN, 0.3), (JOINT, 0.4))]
    (line,) = joint_basis.lines(rows)
    assert (line[2], line[3], line[5]) == ("3", "0.4000 ± 0.1000", "+0.1000 ± 0.0000")
