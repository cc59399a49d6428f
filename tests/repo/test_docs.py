"""Every Python block of the documentation runs, page by page, on a tiny model."""

from __future__ import annotations

import re
import runpy
import textwrap
from pathlib import Path

import pytest
from models import Rows, batches_for, make
from processes import python

DOCS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


def blocks(page: Path) -> str:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return textwrap.dedent("\n".join(found))


@pytest.mark.parametrize("page", [page for page in DOCS if page.stem != "quickstart"], ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / f"{page.stem}.py"
    script.write_text(blocks(page), encoding="utf-8")
    batches = batches_for("llama")
    given = {"model": make("llama"), "fresh": lambda: make("llama"), "data": Rows(), "dataloader": batches}
    given |= {"batch": batches[0], "out": str(tmp_path)}
    runpy.run_path(str(script), init_globals=given)


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_a_pasted_page_prints_what_it_says(name: str, tmp_path: Path) -> None:
    code = blocks(DOCS[0].parents[1] / name)
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    printed = python("-W", "ignore", "-c", code, cwd=tmp_path)
    assert said
    assert [line for line in printed.splitlines() if line in said] == said
    assert (tmp_path / "runs" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("name", ["api", "settings", "compatibility"])
def test_a_page_is_what_docstrings_and_tables_say(name: str) -> None:
    made = runpy.run_path(str(DOCS[0].parent / f"make_{name}.py"))["page"]()
    assert (DOCS[0].parent / f"{name}.md").read_text(encoding="utf-8") == made, f"run python docs/make_{name}.py"


def test_the_walks_name_functions_that_exist() -> None:
    page = DOCS[0].parent / "architecture.md"
    found = re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text(encoding="utf-8"))
    assert len(found) > 30
    for name, file in found:
        owner, _, method = name.rpartition(".")
        pattern = rf"^class {owner}\b.*^    def {method}\(" if owner else rf"^(def|class) {name}\b"
        source = (page.parent / file).read_text(encoding="utf-8")
        assert re.search(pattern, source, re.MULTILINE | re.DOTALL), f"{name} in {file}"
