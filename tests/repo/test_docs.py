"""Every block of the documentation runs, page by page, on a tiny model."""

import json
import re
import runpy
import shlex
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from command import call
from processes import ROOT, python

import lorasb
from lorasb import constants
from lorasb.app import cli

DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path) -> str:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return textwrap.dedent("\n".join(found))


def run(page: Path, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python blocks in a folder, with these names defined; return all names afterwards."""
    script = folder / f"{page.stem}.py"
    script.write_text(blocks(page), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runpy.run_path(str(script), init_globals=given)


@pytest.fixture(scope="module")
def names(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that Quick start defines and the other pages use."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pinned memory without a GPU
        patch.setattr(lorasb, "demo_model", lambda: str(tiny))
        return run(ROOT / "docs" / "quickstart.md", tmp_path_factory.mktemp("quickstart"), {})


@pytest.mark.parametrize("page", [page for page in DOCS if page.stem != "quickstart"], ids=lambda page: page.stem)
def test_every_block_runs(page: Path, names: dict[str, Any], tmp_path: Path) -> None:
    run(page, tmp_path, names)


@pytest.mark.long
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_a_pasted_page_prints_what_it_says(name: str, tmp_path: Path) -> None:
    code = blocks(ROOT / name)
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    printed = python("-W", "ignore", "-c", code, cwd=tmp_path)
    assert said
    assert [line for line in printed.splitlines() if line in said] == said
    assert (tmp_path / "runs" / "adapter" / "adapter_config.json").is_file()


def commands(program: str, *pages: Path) -> list[str]:
    """The arguments after a program's name in shell blocks and inline code."""
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        shell = "\n".join(block.replace("\\\n", "") for language, block in fences if language != "python")
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`([^`]+)`", prose) + re.findall(r"^    (\S.*)$", prose, re.MULTILINE)
        for line in [*shell.splitlines(), *spans]:
            match = re.match(rf"(?:\$ |[A-Z_]+=\S+ |\S*/|.*-m )*{program} (.*)", line, re.DOTALL)
            if match:
                found.append(match[1])
    return found


@pytest.mark.parametrize("line", commands("lorasb", *DOCS, ROOT / "README.md"))
def test_a_command_parses(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):  # a group
        command = command.commands[words.pop(0)]
    if words:  # more than the command's name
        command.make_context("lorasb", words)  # parses, and runs nothing


@pytest.mark.parametrize("line", commands("pytest", *DOCS, ROOT / "README.md"))
def test_a_test_that_a_page_names_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    paths = [ROOT / word for word in words if word.startswith("tests/")]
    assert [path for path in paths if not path.exists()] == []
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    tests = re.findall(r"def (test_\w+)", "".join(file.read_text(encoding="utf-8") for file in files))
    keys = re.findall(r"\w+", words[words.index("-k") + 1]) if "-k" in words else []
    assert tests
    assert [key for key in keys if key not in ("and", "or", "not") and not any(key in test for test in tests)] == []


def test_the_commands_of_quick_start_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    finetune, ask, export = commands("lorasb", ROOT / "docs" / "quickstart.md")[:3]
    assert "In runs/names:" in call(*shlex.split(finetune, comments=True), "--model", tiny, "--epochs", 1)
    found = json.loads((tmp_path / "runs/names/summary.json").read_text(encoding="utf-8"))
    assert found["config"]["dtype"] == "auto" != found["identity"]["dtype"] == found["dtype"]
    assert call(*shlex.split(ask, comments=True))
    assert call(*shlex.split(export, comments=True))
    assert (tmp_path / "runs/names/adapter-lora/adapter.gguf").is_file()


def test_messages_link_to_the_documentation_of_the_package() -> None:
    assert f'Documentation = "{constants.DOCS}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["api", "settings", "compatibility"])
def test_a_page_is_what_docstrings_and_tables_say(name: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / f"make_{name}.py"))["page"]()
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == made, f"run python docs/make_{name}.py"


def test_the_walks_name_functions_that_exist() -> None:
    page = ROOT / "docs" / "architecture.md"
    found = re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text(encoding="utf-8"))
    assert len(found) > 30
    for name, file in found:
        owner, _, method = name.rpartition(".")
        pattern = rf"^class {owner}\b.*^    def {method}\(" if owner else rf"^(def|class) {name}\b"
        source = (page.parent / file).read_text(encoding="utf-8")
        assert re.search(pattern, source, re.MULTILINE | re.DOTALL), f"{name} in {file}"
