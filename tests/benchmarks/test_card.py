"""`benchmarks.card`, meant for a GPU: its sections also run on a CPU, are saved one by one, and are measured once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, python

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
        assert list(found["sections"]) == sections  # those of another commit are gone
    assert found["machine"]["device"] == "cpu"
    assert found["sections"]["few tokens"] == before["sections"]["few tokens"]
    for kept in found["sections"].values():
        assert kept["replaces"]
        for row in kept["rows"]:
            assert {"bare", "chain", "ours"} <= set(row["ways"])
            assert all(0 < way["p20"] <= way["p50"] <= way["p80"] for way in row["ways"].values())
    assert "addmm, unsloth's order" in before["sections"]["few tokens"]["rows"][0]["ways"]  # its gradients were checked


def test_what_is_replaced_is_there() -> None:
    for _, places in card.SECTIONS.values():
        for file, text in places:
            file = file.replace("ARCH", "sm_86")
            assert text in (ROOT / file).read_text(encoding="utf-8"), file


def test_a_card_that_is_too_small_goes_to_the_next_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run does not try again, either."""
    ran: list[str] = []

    def large(run: card.Run) -> Iterator[card.Row]:
        ran.append("large")
        yield {"case": "first", "ways": {}}
        raise torch.OutOfMemoryError("CUDA out of memory")

    def small(run: card.Run) -> Iterator[card.Row]:
        ran.append("small")
        yield {"case": "second", "ways": {}}

    monkeypatch.setattr(card, "SECTIONS", {"large": (large, ()), "small": (small, ())})
    monkeypatch.setattr("sys.argv", ["card", "--tiny", "--output", str(tmp_path), "--minutes", "0"])
    card.main()
    assert "large: not begun, as 0 minutes are over; the same command" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["card", "--tiny", "--output", str(tmp_path)])
    for _ in range(2):
        card.main()
        assert "out of memory" in capsys.readouterr().out
    rows = {name: [row["case"] for row in kept["rows"]] for name, kept in found_in(tmp_path)["sections"].items()}
    assert rows == {"large": ["first", card.NO_MEMORY], "small": ["second"]}
    assert ran == ["large", "small"]


def test_a_section_that_fails_or_is_cut_off_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are saved as they are measured, and the sections after it still run."""
    found_at_second: list[Any] = []

    def broken(run: card.Run) -> Iterator[card.Row]:
        yield {"case": "first", "ways": {}}
        found_at_second.append(found_in(tmp_path)["sections"]["broken"]["rows"][0]["case"])
        raise ImportError("No module named 'bitsandbytes'\nmore")

    def slow(run: card.Run) -> Iterator[card.Row]:
        yield {"case": "first", "ways": {}}
        monkeypatch.setattr(card.time, "monotonic", lambda: float("inf"))
        yield {"case": "second", "ways": {}}
        raise AssertionError("measured after its time")

    def stopped(run: card.Run) -> Iterator[card.Row]:
        yield {"case": "first", "ways": {}}
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["card", "--tiny", "--output", str(tmp_path)])
    monkeypatch.setattr(card, "SECTIONS", {"stopped": (stopped, ())})
    with pytest.raises(KeyboardInterrupt):
        card.main()
    assert not found_in(tmp_path)["sections"]["stopped"]["complete"]
    monkeypatch.setattr(card, "SECTIONS", {"broken": (broken, ()), "slow": (slow, ())})
    with pytest.raises(SystemExit, match="failed: broken; the same command measures them again"):
        card.main()
    sections = found_in(tmp_path)["sections"]
    failed = f"{card.FAILED} ImportError: No module named 'bitsandbytes'"
    assert found_at_second == ["first"]
    assert [row["case"] for row in sections["broken"]["rows"]] == ["first", failed]
    assert [row["case"] for row in sections["slow"]["rows"]] == ["first", "second", card.NO_TIME]
    assert "out of time" in capsys.readouterr().out
    assert not any(kept["complete"] for kept in sections.values())


@pytest.mark.long
def test_every_section_runs(tmp_path: Path) -> None:
    python("-m", "benchmarks.card", "--tiny", "--output", tmp_path)
    found = found_in(tmp_path)
    assert list(found["sections"]) == list(card.SECTIONS)
    assert len(found["sections"]["linears"]["rows"]) == 14
    assert all({"addmm", "fused"} <= set(row["ways"]) for row in found["sections"]["paths"]["rows"])
    assert set(found["sections"]["training"]["rows"][1]["bytes"]) == {"PEFT LoRA r=32", "ours"}
