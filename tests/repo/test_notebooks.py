"""The notebooks run from top to bottom, on a tiny model, and have the outputs of the real one."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny_run import make_tiny

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_both_are_there_with_outputs_and_no_paths_of_a_machine() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == ["how_it_works", "quickstart"]
    for notebook in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells), notebook.name
        assert sum(bool(cell.outputs) for cell in cells) >= 4, notebook.name
        text = notebook.read_text()
        assert not any(part in text for part in ("/home/", "/root/", "/tmp/", '"stderr"')), notebook.name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_MODEL", str(make_tiny(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    found = nbformat.read(notebook, 4)
    client = nbclient.NotebookClient(found, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    asyncio.run(client.async_execute())  # raises for a cell that does
