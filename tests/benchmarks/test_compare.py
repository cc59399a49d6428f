"""`python -m benchmarks.common.compare`: what it calls a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import compare


def run(ratio: float, half: float = 0.01, case: str = "M=1") -> dict[str, Any]:
    ours = {"ratio": ratio, "ratio_p20": ratio - half, "ratio_p80": ratio + half}
    peer = {"ratio": 1.0, "ratio_p20": 1.0, "ratio_p80": 1.0}
    return {"machine": {"cpu": "x"}, "rows": [{"row": "train", "case": case, "ways": {"peer": peer, "ours": ours}}]}


@pytest.mark.parametrize(
    ("after", "half", "verdict"), [(0.9, 0.01, "slower"), (0.7, 0.01, "faster"), (0.81, 0.01, ""), (0.9, 0.1, "")]
)
def test_a_change_is_one_beyond_noise(after: float, half: float, verdict: str) -> None:
    (change,), apart = compare.compare(run(0.8), run(after, half))
    assert (change.name, change.verdict, apart) == ("train M=1 ours", verdict, [])
    assert change.factor == pytest.approx(after / 0.8)


def test_figures_that_one_run_lacks_are_named() -> None:
    changes, apart = compare.compare(run(0.8), run(0.8, case="M=2"))
    assert changes == []
    assert apart == ["train M=1 ours", "train M=2 ours"]


def test_committed_results_are_understood() -> None:
    for name in ("cpu", "four-bits-cpu", "step-cpu"):
        path = Path(compare.__file__).parents[1] / "results" / f"{name}.json"
        changes, apart = compare.compare(compare.read(path), compare.read(path))
        assert changes
        assert not apart
        assert not any(change.verdict for change in changes)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(SystemExit, match="expected a JSON file"):
        compare.read(path)
    path.write_text(json.dumps({"ratio": 1}), encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no ratios"):
        compare.read(path)
