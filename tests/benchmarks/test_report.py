"""`benchmarks/REPORT.md`: sections follow their files, verdicts their definition; what was not run is left out."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from compared_methods import row

from benchmarks.common.csv_files import read_csv
from benchmarks.quantized import table as four_bits_table
from benchmarks.research.methods import grid, rows
from benchmarks.research.methods.grid import METHODS, TASKS, Cell
from benchmarks.research.paper import costs
from benchmarks.research.reporting import __main__ as report
from benchmarks.research.reporting import verdicts
from benchmarks.training import planned

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS, RESEARCH = BENCHMARKS / "results", BENCHMARKS / "research" / "results"
TASK = TASKS["chain_sum"]
LOSSES = {
    "LoRA-SB": {16: 0.40, 64: 0.30, 96: 0.31},
    "LoRA-XS": {16: 0.50, 64: 0.31, 96: 0.20},
    "LoRA": {32: 0.30},
}


def fill(path: Path) -> None:
    """Write a grid in which LoRA-SB beats LoRA-XS at r = 16, is level at 64 and worse at 96; seeds are 0.02 apart."""
    for method, r, loss in ((method, r, loss) for method, by_rank in LOSSES.items() for r, loss in by_rank.items()):
        start = TASK.rates[METHODS[method].family].start
        for i, lr in enumerate(start):
            rows.append(path, row(Cell(TASK.name, "validation", method, r, lr, 0), loss + abs(i - 1)))
        for seed in grid.SEEDS:
            rows.append(path, row(Cell(TASK.name, "test", method, r, start[1], seed), loss + 0.02 * (seed - 1)))


def test_verdicts(tmp_path: Path) -> None:
    fill(tmp_path / "methods.csv")
    there = rows.read(tmp_path / "methods.csv")
    words = {(v.ours.r, v.measure): v.word for v in verdicts.against_xs(there, TASK.name)}
    expected = {16: "better", 64: "level", 96: "worse"}
    assert words == {(r, measure): word for r, word in expected.items() for measure in ("score", "loss")}
    first = verdicts.against_xs(there, TASK.name)[0]
    assert (first.gain, first.deviation) == pytest.approx((0.1, 2**0.5 * 0.02))
    others = verdicts.against_others(there, TASK.name)
    words = {16: "worse", 64: "level", 96: "level"}
    assert [(v.theirs.method, v.ours.r, v.word) for v in others] == [("LoRA", r, word) for r, word in words.items()]


def test_nothing_run_is_nothing_said(tmp_path: Path) -> None:
    page = report.compose(tmp_path, tmp_path)
    assert "why not" not in page.removeprefix(report.HEAD)
    assert "No card has been measured yet" in page
    assert "![" not in page


def test_the_committed_page_is_what_the_results_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (RESULTS, RESEARCH):
        shutil.copytree(folder, tmp_path / folder.parent.name)
    pictures = [tmp_path / "research" / name for name in ("methods.png", "rates.png")]
    for picture in pictures:
        picture.unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())
    page = report.compose(tmp_path / "research", tmp_path / "benchmarks")
    assert page == (BENCHMARKS / "REPORT.md").read_text(encoding="utf-8")
    assert all(picture.is_file() for picture in pictures)


def page_of(name: str) -> str:
    return (BENCHMARKS.parent / "docs" / f"{name}.md").read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def test_the_tables_of_the_pages_are_the_results() -> None:
    assert report.into_readme(page_of("evidence"), RESEARCH) == page_of("evidence")
    four_bits, planner = four_bits_table.table(result("four-bits-cpu.json"))[-6:], result(planned.FILE)
    ratios = re.findall(r"\d\.\d+x|\b0\.\d{3}\b", "".join(four_bits))
    assert len(ratios) == 7
    assert [ratio for ratio in ratios if ratio not in page_of("quantized")] == []
    assert [line for line in planned.page(planner) if line not in page_of("planner").splitlines()] == []
    alive, resident = zip(*(planned.Found(**run).ratios for run in planner["runs"]), strict=True)
    assert all(0.9 < ratio < 1.1 for ratio in alive)
    # with checkpointing in fp32, holes vary from run to run by as much as they take
    varies = [run["checkpointing"] and "float32" in run["model"] for run in planner["runs"]]
    assert len(varies) == 12
    assert all((0.8 if one else 0.9) < ratio < 1.1 for one, ratio in zip(varies, resident, strict=True))


def test_table_8_is_what_is_counted() -> None:
    counted = [{name: str(value) for name, value in row.items()} for row in costs.rows()]
    assert counted == read_csv(RESEARCH / "costs.csv")


def test_every_file_of_results_says_where_and_when() -> None:
    for line in read_csv(RESEARCH / "methods.csv"):
        assert all(line[name] for name in ("version", "machine", "date")), line
        assert "dirty" not in line["version"], line
    for path in BENCHMARKS.glob("**/results/*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found.get("machine") or found.get("machine_info"), path
