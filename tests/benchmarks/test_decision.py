"""When an entry would become the default: every rival beaten on three tasks at two ranks, none lost to, level with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.research.paired.compare import Difference
from benchmarks.research.paired.decision import RIVALS, Standing, is_level
from benchmarks.research.paired.grid import LORA, TASKS
from benchmarks.research.reporting import paired


def differences(other: str, tasks: Sequence[str], ranks: Sequence[int], mean: float) -> list[Difference]:
    return [Difference(task, r, "new", other, mean, 0.001, 8, 0.5) for task in tasks for r in ranks]


def standing(tasks: Sequence[str] = TASKS[:3], ranks: Sequence[int] = (4, 16)) -> Standing:
    """Better than every rival, and as good as LoRA, on these tasks at these ranks."""
    against = {name: differences(name, tasks, ranks, -0.1) for name in RIVALS}
    return Standing("new", against | {LORA: differences(LORA, tasks, ranks, 0.005)})


def test_three_tasks_at_two_ranks_are_needed() -> None:
    assert standing().wins
    assert not standing(tasks=TASKS[:2]).wins
    assert not standing(ranks=(16,)).wins
    assert standing().level == 3


def test_every_rival_has_to_be_beaten_on_the_same_tasks() -> None:
    for name in RIVALS:
        one = standing()
        one.against[name][0] = replace(one.against[name][0], mean=0.0)  # a tie
        assert not one.wins
    apart = standing(tasks=TASKS)
    for name, task in zip(RIVALS, TASKS, strict=False):  # each rival ties on another task: three beaten by each
        apart.against[name] = [replace(d, mean=0.0) if d.task == task else d for d in apart.against[name]]
    assert not apart.wins


def test_one_loss_is_too_many() -> None:
    for mean in (0.1, float("nan")):
        one = standing(tasks=TASKS)
        one.against["random"][-1] = replace(one.against["random"][-1], mean=mean)
        assert not one.wins


def test_a_rival_that_diverges_is_beaten() -> None:
    one = standing()
    one.against["random"] = [replace(d, mean=float("-inf")) for d in one.against["random"]]
    assert one.wins


def test_it_has_to_be_level_with_lora_with_the_whole_interval() -> None:
    close, near, better = (Difference(TASKS[0], 16, "new", LORA, mean, 0.004, 8, 0.5) for mean in (0.005, 0.008, -0.3))
    assert [is_level(one) for one in (close, near, better)] == [True, False, True]
    one = standing()
    one.against[LORA] = one.against[LORA][:2]  # both of one task
    assert one.level == 1
    assert not one.wins


def test_the_table_tells_better_level_and_worse() -> None:
    one = standing()
    one.against["random"] = [replace(d, mean=m) for d, m in zip(one.against["random"], (0.0, 0.1, -0.1), strict=False)]
    assert paired.tally(one, "random") == "1 / 1 / 1"
    assert paired.tally(one, RIVALS[0]) == "6 / 0 / 0"
    one.against["random"] = []
    assert paired.tally(one, "random") == ""
