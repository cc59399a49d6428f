"""Every example runs, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from tiny_run import make_tiny

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_each_is_short_and_says_what_it_prints() -> None:
    assert EXAMPLES
    for example in EXAMPLES:
        assert len(example.read_text().splitlines()) <= 60, example.name


def test_personal_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = next(example for example in EXAMPLES if example.stem == "personal_adapters")
    monkeypatch.setattr(sys, "argv", [example.name, "3", str(make_tiny(tmp_path))])
    runpy.run_path(str(example))
    printed = capsys.readouterr().out
    assert "step 0: mean loss" in printed
    assert "step 2: mean loss" in printed
    assert "20 adapters, " in printed
    assert "of 40 answers right" in printed
