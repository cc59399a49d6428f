"""The suite's report: every number comes from the results, and those of two machines are not mixed."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, python

from benchmarks.common.shapes import MODELS
from benchmarks.layers import suite_report as report


def stats(p50: float, bare: float) -> dict[str, Any]:
    times, ratios = dict.fromkeys(("p20", "p50", "p80"), p50), ("ratio", "ratio_p20", "ratio_p80")
    return times | dict.fromkeys(ratios, p50 / bare) | {"rounds": 9, "peak_bytes": 1, "saved_bytes": 2048}


def case(n: int, ms: tuple[int, ...], direction: str) -> dict[str, Any]:
    bare = sum(ms) * n / 1e6
    times = {"bare": bare, "chain": 1.5 * bare, "PEFT LoRA r=32": 1.3 * bare, "ours": 1.25 * bare}
    times |= {"ours, grouped": 1.2 * bare} if len(ms) > 1 else {}
    variants = {name: stats(time, bare) for name, time in times.items()}
    shape = {"n": n, "ms": list(ms), "r": 96, "M": 2048, "dtype": "bfloat16"}
    return {"extra_info": shape | {"direction": direction, "variants": variants}}


def results(path: Path, gpu: str = "A card", skip: int = 0) -> Path:
    groups = MODELS["mistral-7b"][skip:]
    cases = [case(g.n, g.ms, direction) for g in groups for direction in ("forward", "forward+backward")]
    machine = {"device": "cuda", "gpu": gpu, "torch": "2.13", "peft": "0.21"}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": cases}))
    return path


@pytest.mark.long  # starts pytest
def test_make_finds_the_suite() -> None:
    command = re.search(r"^BENCH = \$\(BIN\)/python (.+) \$\(SECONDS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command
    assert "bench_layer.py" in python(*shlex.split(command[1]), 1, "--collect-only", "--benchmark-disable")


def test_tables_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = results(tmp_path / "card.json")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    report.main()
    printed = capsys.readouterr().out
    for word in ("A card", "1.250 (1.25-1.25)", "mistral-7b", "ours takes 0.833x of the chain's time"):
        assert word in printed
    assert (tmp_path / "card.png").stat().st_size > 10_000


def test_a_block_is_summed_only_where_it_was_measured_whole(tmp_path: Path) -> None:
    for skip in (0, 1):
        _, rows = report.read([results(tmp_path / "card.json", skip=skip)])
        assert report.blocks(rows).row_count == 1 - skip


def test_results_of_two_machines_and_none_are_refused(tmp_path: Path) -> None:
    one, other = results(tmp_path / "a.json"), results(tmp_path / "b.json", "Another")
    with pytest.raises(ValueError, match="another machine"):
        report.read([one, other])
    with pytest.raises(ValueError, match="run make bench-gpu or make bench-cpu first"):
        report.read([results(tmp_path / "none.json", skip=len(MODELS["mistral-7b"]))])
