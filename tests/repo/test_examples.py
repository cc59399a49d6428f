"""Every example and notebook runs on a tiny model, and its file shows the output of the real one."""

import ast
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from command import call

from lorasb.app.data import load_examples
from lorasb.app.settings import Settings

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES, NOTEBOOKS = sorted(FOLDER.glob("*.py")), sorted(FOLDER.glob("*.ipynb"))
# What each prints, also with a tiny model.
PRINTED = {
    "export": ["plain LoRA of rank 16", "LoraModel gives the same logits within"],
    "four_bits_cpu": ["MB in 4", "held-out loss"],
    "lora_at_equal_parameters": ["LoRA r=3: ", "LoRA-SB r=64: ", "held-out loss"],
    "new_user": ["basis: ", "zoe: "],
    "grpo": ["mean reward on held-out prompts", "trained numbers"],
    "personal_adapters": ["mean loss", "20 adapters, ", "of 40 answers right"],
    "trainer": ["of 16 held-out lists right"],
    "vllm_server": ["LORASB_BASIS=runs/vllm_server python -m vllm"],
    "trl_sft": ["What color is milk?", "of 4 held-out answers in the trained style"],
}


def test_each_is_short_and_its_docstring_has_the_command_and_the_output() -> None:
    assert {example.stem for example in EXAMPLES} == set(PRINTED)
    for example in EXAMPLES:
        text = example.read_text()
        assert len(text.splitlines()) <= 60, example.name
        said = ast.get_docstring(ast.parse(text)) or ""
        assert f"python examples/{example.name}" in said, example.name
        assert len(said.splitlines()) >= 4, example.name


@pytest.mark.filterwarnings("ignore")  # about pinned memory without a GPU, and TRL's preparations
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_it_runs(
    example: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example.name, "3", str(tiny)])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    for text in PRINTED[example.stem]:
        assert text in printed


def test_a_row_of_each_of_the_people_is_held_out_by_default() -> None:
    train, held_out = load_examples(Settings(data=str(FOLDER / "people.jsonl"), adapter_column="user"))
    assert sorted(example.adapter for example in held_out) == ["ada", "alan", "grace"]
    known = {(example.adapter, example.completion) for example in train}
    assert all((example.adapter, example.completion) in known for example in held_out)  # asked in other words


def test_what_the_demo_says_comes_next_are_commands_that_parse_and_files_that_are_there() -> None:
    makefile = (FOLDER.parent / "Makefile").read_text()
    commands = re.findall(r'@echo "  \$\(BIN\)/lorasb ([^#"]+)', makefile)
    assert len(commands) == 4
    for command in commands:
        name, *arguments = shlex.split(command.replace("$(RUN)", "runs/demo"))
        assert call(name, *arguments, "--help")
        for argument in arguments:
            assert not argument.endswith(".jsonl") or (FOLDER.parent / argument).is_file()


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_both_are_there_with_outputs_and_no_paths_of_a_machine() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == ["how_it_works", "quickstart"]
    for notebook in NOTEBOOKS:
        cells = code_cells(notebook)
        assert all(cell["execution_count"] for cell in cells), notebook.name
        assert sum(bool(cell["outputs"]) for cell in cells) >= 4, notebook.name
        text = notebook.read_text()
        assert not any(part in text for part in ("/home/", "/root/", "/tmp/", '"stderr"')), notebook.name


ONE, OTHER = NOTEBOOKS  # the first has more cells; docs/quickstart.md runs the same code as the second


@pytest.mark.parametrize(
    "notebook", [ONE, pytest.param(OTHER, marks=pytest.mark.long)], ids=["how_it_works", "quickstart"]
)
def test_a_notebook_runs(notebook: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_MODEL", str(tiny))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    code = "\n\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    exec(compile(code, notebook.name, "exec"), {"__name__": "__main__"})
    plt.close("all")
