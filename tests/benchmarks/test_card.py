"""`benchmarks.card`, which waits for a card: its sections run on a CPU, are kept one by one, and are not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import python

from benchmarks import card


def run(folder: Path, *options: str) -> dict[str, Any]:
    """Its file, after a run on the CPU."""
    python("-m", "benchmarks.card", "--tiny", "--output", folder, *options)
    found: dict[str, Any] = json.loads((folder / "tiny.json").read_text())
    return found


def test_sections_are_kept_and_say_what_they_replace(tmp_path: Path) -> None:
    first = run(tmp_path, "--only", "few tokens")
    assert list(first["sections"]) == ["few tokens"]
    assert first["machine"]["device"] == "cpu"
    second = run(tmp_path, "--only", "dropout")
    assert second["sections"]["few tokens"] == first["sections"]["few tokens"]
    for section in second["sections"].values():
        assert section["replaces"].startswith(("docs/", "README"))
        for row in section["rows"]:
            assert {"bare", "chain", "ours"} <= set(row["ways"])
            assert all(0 < way["p20"] <= way["p50"] <= way["p80"] for way in row["ways"].values())


def test_another_commit_starts_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps({"commit": "another", "sections": {"linears": {"rows": []}}}))
    assert list(run(tmp_path, "--only", "few tokens")["sections"]) == ["few tokens"]


@pytest.mark.long
def test_every_section_runs(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert list(found["sections"]) == list(card.SECTIONS)
    assert len(found["sections"]["linears"]["rows"]) == 14
    assert set(found["sections"]["training"]["rows"][1]["bytes"]) == {"PEFT LoRA r=32", "ours"}
