"""`lorasb ask` puts a question as training did: it answers as the run's own evaluation after training."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import WORDS
from typer.testing import CliRunner

from lorasb.app import results as ask
from lorasb.app.cli import app
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import Settings


def rows(kind: str) -> list[dict[str, Any]]:
    pairs = [(f"copy {WORDS[i % 10]} {i % 7}", WORDS[i % 10]) for i in range(24)]
    if kind == "messages":
        turn = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        return [{"messages": [turn[0] | {"content": q}, turn[1] | {"content": a}]} for q, a in pairs]
    if kind == "alpaca":
        return [{"instruction": q, "output": a} for q, a in pairs]
    if kind == "labels":
        return [{"text": q, "label": "cat" if i % 2 else "dog"} for i, (q, _) in enumerate(pairs)]
    if kind == "values":
        return [{"text": q, "label": i + 0.5} for i, (q, _) in enumerate(pairs)]
    return [{"prompt": q, "completion": a, "user": f"u{i % 2}"} for i, (q, a) in enumerate(pairs)]


CASES: dict[str, dict[str, Any]] = {
    "chat template": {},
    "plain": {"template": "none"},
    "messages": {},
    "alpaca": {},
    "labels": {},
    "values": {},
    "adapters": {"adapter_column": "user"},
    "plain lora": {"method": "lora"},
    "four bits": {"bits": 4},
}


@pytest.fixture(scope="module")
def finished(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of a kind, which is made once."""

    @functools.cache
    def run(kind: str) -> Path:
        folder, found = tmp_path_factory.mktemp("asked"), rows(kind)
        file = folder / ("data.json" if kind == "alpaca" else "data.jsonl")
        file.write_text(json.dumps(found) if kind == "alpaca" else "\n".join(map(json.dumps, found)))
        run_finetune(replace(base, data=str(file), output=str(folder / "run"), **CASES[kind]))
        return folder / "run"

    return run


@pytest.mark.parametrize("kind", CASES)
def test_an_answer_is_that_of_the_run(finished: Callable[[str], Path], kind: str) -> None:
    run = finished(kind)
    held_out = json.loads((run / "answers.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    for row in held_out:
        question = row["prompt"]
        if kind == "alpaca":
            assert question.startswith("Below is an instruction")
            question = question.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]
        # generation ends four tokens after the longest right answer there
        (found,) = ask.answers(run, question, row.get("adapter"), max_new_tokens=5)
        if kind == "values":
            assert float(found) == pytest.approx(float(row["after"]), rel=1e-3)
        else:
            assert found[: len(row["after"])] == row["after"], question
    card = (run / "adapter" / "README.md").read_text()
    lines = ask.how_to(summary, run)
    assert lines["command"].startswith(f"lorasb ask {run} ")
    assert ("--adapter u0" in lines["command"]) == (kind == "adapters")
    assert lines["command"] in card
    assert lines["python"] in card


@pytest.mark.parametrize("kind", ["chat template", "plain", "labels"])
def test_the_four_lines_of_python_run(
    finished: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(kind)
    summary, row = json.loads((run / "summary.json").read_text()), json.loads((run / "answers.json").read_text())[0]
    code = ask.how_to(summary, run)["python"].replace("QUESTION", row["prompt"]).replace("TEXT", row["prompt"])
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    printed = capsys.readouterr().out
    assert "tensor" in printed if kind == "labels" else row["after"] in printed


def test_questions_are_read_line_by_line(finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("chat template")
    questions = [row["prompt"] for row in json.loads((run / "answers.json").read_text())]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([questions[0], "", questions[1]]) + "\n"))
    assert list(ask.answers(run, None, max_new_tokens=3)) == [
        answer for question in questions[:2] for answer in ask.answers(run, question, max_new_tokens=3)
    ]


def test_what_cannot_be_asked_is_said(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a question, got an empty one"):
        list(ask.answers(whole, " "))
    with pytest.raises(ValueError, match=r"expected the folder of a finished run, found no summary\.json in"):
        list(ask.answers(tmp_path, "x"))
    with pytest.raises(ValueError, match=r"--adapter has to name one of the run's adapters, got 'ann': it trained one"):
        list(ask.answers(whole, "x", "ann"))
    summary = json.loads((whole / "summary.json").read_text())
    del summary["prompt_format"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="does not say how questions are put: an earlier version of lorasb wrote it"):
        list(ask.answers(tmp_path, "x"))
    done = CliRunner().invoke(app, ["ask", str(whole), "copy red 1", "--max-new-tokens", "2"])
    assert done.exit_code == 0
    assert done.output.strip()


def test_the_command_can_be_pasted_whatever_a_prompt_has(tmp_path: Path) -> None:
    """A prompt from someone's data must not run in the user's shell, nor break a card's fences."""
    summary = {"adapters": {}, "prompt_format": ask.PLAIN, "classes": None, "config": {"model": "m"}}
    question = 'a $(touch PWNED) `touch PWNED` "b" it\'s\n```'
    command = ask.how_to(summary, tmp_path / "my runs", question)["command"]
    printing = ["bash", "-c", command.replace("lorasb ask", "printf '%s\\n'", 1)]
    assert subprocess.check_output(printing, cwd=tmp_path, text=True).splitlines() == [
        str(tmp_path / "my runs"),
        " ".join(question.split()),
    ]
    assert not (tmp_path / "PWNED").exists()
    assert ask.how_to(summary, tmp_path / "run")["command"].endswith(" QUESTION")
    assert ask.how_to(summary | {"prompt_format": ask.INSTRUCTED}, tmp_path, question)["command"].endswith(" QUESTION")
