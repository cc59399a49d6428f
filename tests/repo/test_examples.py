"""Every example and notebook runs, on a tiny model, and has the output of the real one."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from command import call
from processes import python
from safetensors.torch import load_file

from lorasb.app.data import load_examples
from lorasb.app.settings import Settings

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES, NOTEBOOKS = sorted(FOLDER.glob("*.py")), sorted(FOLDER.glob("*.ipynb"))
# What each prints, of a tiny model too.
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


@pytest.mark.filterwarnings("ignore")  # of pinned memory without a GPU, and of what TRL prepares
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


@pytest.mark.long
def test_two_processes_end_where_one_does(tiny: Path, tmp_path: Path) -> None:
    for name, launcher in {"one": (), "two": ("-m", "torch.distributed.run", "--nproc-per-node", 2)}.items():
        (tmp_path / name).mkdir()
        options = {"cwd": tmp_path / name, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
        printed = python("-W", "ignore", *launcher, FOLDER / "trainer.py", 3, tiny, **options)
        assert printed.count("held-out lists right") == 1
    file = "runs/trainer/adapter/adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def test_a_row_of_each_of_the_people_is_held_out_by_default() -> None:
    train, held_out = load_examples(Settings(data=str(FOLDER / "people.jsonl"), adapter_column="user"))
    assert sorted(example.adapter for example in held_out) == ["ada", "alan", "grace"]
    known = {(example.adapter, example.completion) for example in train}
    assert all((example.adapter, example.completion) in known for example in held_out)  # in other words


def test_what_the_demo_says_comes_next_are_commands_that_parse_and_files_that_are_there() -> None:
    makefile = (FOLDER.parent / "Makefile").read_text()
    commands = re.findall(r'@echo "  \$\(BIN\)/lorasb ([^#"]+)', makefile)
    assert len(commands) == 4
    for command in commands:
        name, *arguments = shlex.split(command.replace("$(RUN)", "runs/demo"))
        assert call(name, *arguments, "--help")
        for argument in arguments:
            assert not argument.endswith(".jsonl") or (FOLDER.parent / argument).is_file()


def test_both_are_there_with_outputs_and_no_paths_of_a_machine() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == ["how_it_works", "quickstart"]
    for notebook in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells), notebook.name
        assert sum(bool(cell.outputs) for cell in cells) >= 4, notebook.name
        text = notebook.read_text()
        assert not any(part in text for part in ("/home/", "/root/", "/tmp/", '"stderr"')), notebook.name


ONE, OTHER = NOTEBOOKS  # the first with more cells; docs/quickstart.md runs what the second does


@pytest.mark.parametrize(
    "notebook", [ONE, pytest.param(OTHER, marks=pytest.mark.long)], ids=["how_it_works", "quickstart"]
)
def test_a_notebook_runs(notebook: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_MODEL", str(tiny))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    found = nbformat.read(notebook, 4)
    client = nbclient.NotebookClient(found, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    asyncio.run(client.async_execute())  # raises for a cell that does
