"""Which layers `--target-modules` names."""

from __future__ import annotations

from typing import Any

import pytest

from lorasb.recipes import adapter


@pytest.mark.parametrize(
    ("said", "want"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*layers\.[01]\..*proj", r".*layers\.[01]\..*proj"),
    ],
)
def test_a_list_a_pattern_or_all_linear_layers(said: str | None, want: Any) -> None:
    assert adapter.targets(said) == want
