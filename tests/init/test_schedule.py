"""The first learning rate of a schedule."""

from __future__ import annotations

import pytest

from lorasb.init import first_step_lr


def test_first_step_lr() -> None:
    assert first_step_lr(2e-3) == 2e-3
    assert first_step_lr(2e-3, 20) == pytest.approx(1e-4)
    assert first_step_lr(2e-3, 0.1, total_steps=200) == pytest.approx(1e-4)
    for arguments, message in (
        ((0.0,), "positive learning rate"),
        ((1e-3, -1), ">= 0"),
        ((1e-3, 0.1), "give total_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            first_step_lr(*arguments)


def test_the_published_code_counts_batches_of_the_estimation() -> None:
    """Mistral-7B on 50,000 examples: batches of 3 to estimate, steps of 32 to train."""
    batches, steps = 16_667, 1_563
    assert first_step_lr(1e-4, 0.02, total_steps=batches, rule="published") == pytest.approx(3.0e-7, rel=1e-3)
    assert first_step_lr(1e-4, 0.02, total_steps=steps) == pytest.approx(1e-4 / 32)
    assert first_step_lr(1e-4, 0.5, total_steps=1, rule="published") == 2e-4  # not rounded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e-4, 0.02, None), "give total_steps too"),
        ((1e-4, 20, 100), r"a share of the estimation's batches.*got 20 and 100"),
        ((1e-4, 0, 100), "a share of the estimation's batches"),
        ((1e-4, 0.02, 0), "a share of the estimation's batches"),
    ],
)
def test_the_published_rule_needs_a_share_and_batches(arguments: tuple[float, float, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_step_lr(*arguments, rule="published")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="expected rule to be one of schedule, published, got 'paper'"):
        first_step_lr(1e-4, rule="paper")
