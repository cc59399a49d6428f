"""Tasks that a basis was not made from: rows from several processes, and the documentation's table."""

from pathlib import Path

import pytest
from processes import ROOT

from benchmarks.common.csv_files import Row, read_csv
from benchmarks.research import unseen_tasks
from benchmarks.research.methods.runner import RESULTS
from benchmarks.research.shared_bases import UNSEEN
from benchmarks.research.unseen_tasks import FILE, OWN, RANDOM, over_own


def row(task: str, basis: str, loss: float, share: str, seed: int = 0, r: int = 16) -> Row:
    measured = {"rate": "0.01", "loss": loss, "loss_before": 6.0, "share": share, "trained": 256}
    found = {"task": task, "basis": basis, "r": r, "seed": seed, "factor": "1"} | measured
    return {name: str(value) for name, value in (found | {"version": "a", "machine": "b", "date": "c"}).items()}


def test_rows_that_another_process_writes_during_a_run_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process runs an additional cell, and also the cell that is running here."""
    task = UNSEEN[0]

    def run(name: str, kind: str, r: int, seed: int, factor: float, folder: Path | None) -> Row:
        for other in (row(UNSEEN[1], OWN, 1.0, "1"), row(task, OWN, 2.0, "1")) if kind == OWN else ():
            unseen_tasks.append(tmp_path / FILE, other, list(other))
        return row(name, kind, 3.0, "1", seed, r)

    monkeypatch.setattr(unseen_tasks, "run", run)
    asked = ["--task", task, "--basis", OWN, RANDOM, "--r", "16", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["unseen_tasks", *asked])
    unseen_tasks.main()
    found = [(line["task"], line["basis"], line["loss"]) for line in read_csv(tmp_path / FILE)]
    assert found == [(UNSEEN[1], OWN, "1.0"), (task, OWN, "2.0"), (task, RANDOM, "3.0")]


def test_the_documentation_has_the_table() -> None:
    page = (ROOT / "docs" / "many-adapters.md").read_text(encoding="utf-8")
    for line in over_own(read_csv(RESULTS / FILE)):
        assert f"|{'|'.join(line)}|" in page
