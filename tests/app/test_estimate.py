"""What a run says it will take, and what it suggests where that is long."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lorasb.app import estimate
from lorasb.app.settings import Settings
from lorasb.app.tokenize import Encoded
from lorasb.utils.precision import Precision


class TestEstimate:
    def run(self, name: str = "float32", **values: Any) -> Any:
        rows = [Encoded((1,) * 20, (2,) * 5)] * 64
        return SimpleNamespace(
            settings=replace(Settings(), **values),
            precision=Precision(name, ""),
            rows=rows,
            steps=125,
            tokens=50_000,
            epochs=values.get("epochs", 1.0),
        )

    def test_the_first_step_is_slower_and_the_longest_needs_more(self) -> None:
        found = estimate.estimate([(9.0, 100), (2.0, 200)], 10_000, 400, (10**9, 2 * 10**9))
        assert found.seconds == pytest.approx(100)
        assert found.memory == 3 * 10**9

    def test_a_peak_before_training_says_nothing_of_a_step(self) -> None:
        """A line of 8 MB took 5 GB to tokenize, and was estimated at 69 GB of training."""
        found = estimate.estimate([(1.0, 100)], 100, 8000, (1_000, 5_000), peak_before=5_000)
        assert found.memory == 5_000
        assert (
            estimate.estimate([(1.0, 100)], 100, 8000, (1_000, 5_000), peak_before=4_999).memory == 1_000 + 4_000 * 80
        )

    def test_one_line_says_steps_tokens_time_and_memory(self) -> None:
        (line,) = estimate.estimated(self.run(), estimate.Estimate(260, 2_100_000_000))
        assert (
            line
            == "Training on the CPU in float32: 125 steps of 16 examples, 50,000 tokens: about 4 min and 2.1 GB, by the first steps"
        )

    @pytest.mark.parametrize(
        ("values", "want"),
        [
            ({}, "--train-examples 500 (half of the steps)"),
            ({"data": "x"}, "--epochs 0.5 (half of the steps)"),
            ({"data": "x", "epochs": 6.0}, "--epochs 1"),
            ({"train_examples": 50_000}, "--train-examples 1000"),
            ({"name": "bfloat16"}, r"--dtype auto (float32 here)"),
            ({"max_length": 10}, "--max-length 5"),
        ],
    )
    def test_a_long_run_is_told_what_costs_most(
        self, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], want: str
    ) -> None:
        monkeypatch.setattr(estimate, "native", lambda: Precision("float32", ""))
        monkeypatch.setattr(estimate, "slowdown", lambda dtype: 40.0)
        run = self.run(**values)
        first, second = estimate.estimated(run, estimate.Estimate(3 * 3600, 10**9))
        assert "about 3.0 h" in first
        assert second.startswith(f"That is long, and {want}")
        name, saved = estimate.costliest(run, 3 * 3600)
        assert name == want
        assert 0 < saved < 3 * 3600
