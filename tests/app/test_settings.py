"""The one list of settings against its own rules: values that no run can have, and choices that are the library's."""

from __future__ import annotations

from typing import Any

import pytest

from lorasb.app.settings import DTYPES, SCHEDULERS, UPDATES, Settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": "warp"}, "--scheduler must be one of linear, cosine"),
        ({"report_to": "paper"}, "--report-to must be one of none, tensorboard, wandb"),
        ({"save_steps": "often"}, "--save-steps must be auto or a positive number of steps, got 'often'"),
        ({"save_steps": "0"}, "--save-steps must be auto or a positive number"),
        ({"warmup": 1.0}, r"--warmup is a share in \[0, 1\), got 1.0"),
        ({"lora_dropout": 1.0}, r"--lora-dropout is a share in \[0, 1\), got 1.0"),
        (
            {"score": "luck"},
            "--score must be one of exact, number, boxed, symbolic, choice, label, matthews, pearson, spearman, f1, got 'luck'",
        ),
        ({"bits": 8}, "--bits must be 4 or 16, got 8"),
        ({"weight_decay": -1.0}, "--weight-decay must not be negative"),
        ({"rank_pattern": {"q": 0}}, "--rank-pattern must have positive ranks"),
        ({"eval_steps": 0}, "--eval-steps must be positive, got 0"),
        ({"gradient_accumulation": 3}, "--batch-size 16 is not divisible by --gradient-accumulation 3"),
        ({"lr": float("nan")}, "--lr must be positive, at most 10000, got nan"),
    ],
)
def test_values_that_no_run_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values).check()


def test_choices_are_the_librarys() -> None:
    from transformers import SchedulerType

    from lorasb.init import initialization
    from lorasb.utils import precision

    assert initialization.UPDATES == UPDATES
    assert set(DTYPES) == {"auto", *precision.DTYPES}
    assert set(SCHEDULERS) <= {one.value for one in SchedulerType}
