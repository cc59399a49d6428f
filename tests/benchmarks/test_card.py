"""`benchmarks.card`, which waits for a card: its sections run on a CPU, are kept one by one, and are not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import python

from benchmarks import card


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tiny.json").read_text())
    return found


def test_sections_are_kept_and_say_what_they_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps({"commit": "another", "sections": {"linears": {"rows": []}}}))
    for section, sections in (("few tokens", ["few tokens"]), ("dropout", ["few tokens", "dropout"])):
        before = found_in(tmp_path)
        monkeypatch.setattr("sys.argv", ["card", "--tiny", "--output", str(tmp_path), "--only", section])
        card.main()
        found = found_in(tmp_path)
        assert list(found["sections"]) == sections  # another commit's are gone
    assert found["machine"]["device"] == "cpu"
    assert found["sections"]["few tokens"] == before["sections"]["few tokens"]
    for kept in found["sections"].values():
        assert kept["replaces"].startswith(("docs/", "README"))
        for row in kept["rows"]:
            assert {"bare", "chain", "ours"} <= set(row["ways"])
            assert all(0 < way["p20"] <= way["p50"] <= way["p80"] for way in row["ways"].values())


@pytest.mark.long
def test_every_section_runs(tmp_path: Path) -> None:
    python("-m", "benchmarks.card", "--tiny", "--output", tmp_path)
    found = found_in(tmp_path)
    assert list(found["sections"]) == list(card.SECTIONS)
    assert len(found["sections"]["linears"]["rows"]) == 14
    assert set(found["sections"]["training"]["rows"][1]["bytes"]) == {"PEFT LoRA r=32", "ours"}
