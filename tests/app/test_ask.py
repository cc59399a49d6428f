"""`lorasb ask` formats a question as training did, and answers as the run's own evaluation after training did."""

import functools
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import call
from tiny_run import WORDS

from lorasb.app import prepare
from lorasb.app import results as ask
from lorasb.app.data import Example
from lorasb.app.finetune import run_finetune
from lorasb.app.settings import EMBEDDED, Settings
from lorasb.app.tables import advice, before_and_after
from lorasb.utils.atomic_files import cache_dir


def prompted(i: int, question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer, "user": f"u{i % 2}"}


def chat(i: int, question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def instructed(i: int, question: str, answer: str) -> dict[str, Any]:
    """A chat with a system message other than the template's default."""
    return {"messages": [{"role": "system", "content": "copy one"}, *chat(i, question, answer)["messages"]]}


CASES: dict[str, tuple[Callable[[int, str, str], dict[str, Any]], dict[str, Any]]] = {  # row function, settings
    "chat template": (prompted, {}),
    "plain": (prompted, {"template": "none"}),
    "system": (instructed, {}),
    "alpaca": (lambda i, question, answer: {"instruction": question, "output": answer}, {}),
    "labels": (lambda i, question, answer: {"text": question, "label": "cat" if i % 2 else "dog"}, {}),
    "values": (lambda i, question, answer: {"text": question, "label": i + 0.5}, {}),
    "adapters": (prompted, {"adapter_column": "user"}),
    "four bits": (prompted, {"bits": 4}),
}


@pytest.fixture(scope="module")
def finished(blank_pictures: None, base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a finished run of a kind; each kind is run once."""

    @functools.cache
    def run(kind: str) -> Path:
        (row, settings), folder = CASES[kind], tmp_path_factory.mktemp("asked")
        rows = [row(i, f"copy {WORDS[i % 10]} {i % 7}", WORDS[i % 10]) for i in range(24)]
        file = folder / ("list.json" if kind == "alpaca" else "lines.jsonl")
        file.write_text(json.dumps(rows) if kind == "alpaca" else "\n".join(map(json.dumps, rows)))
        run_finetune(replace(base, data=str(file), output=str(folder / "run"), **settings))
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
        # the run generated at most four tokens more than its longest reference answer
        (found,) = ask.answers(run, question, row.get("adapter"), max_new_tokens=5)
        if kind == "values":
            assert float(found) == pytest.approx(float(row["after"]), rel=1e-3)
        else:
            assert found[: len(row["after"])] == row["after"], question
    card = (run / "adapter" / "README.md").read_text()
    lines = ask.how_to(summary, run)
    assert lines["command"].startswith(f"lorasb ask {run} ")
    assert kind not in ("labels", "values") or summary["prompt_format"] == ask.PLAIN  # even if there is a chat template
    assert ("--adapter u0" in lines["command"]) == (kind == "adapters")
    assert lines["command"] in card
    assert lines["python"] in card


@pytest.mark.parametrize("kind", ["chat template", "system", "plain", "labels", "four bits"])
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


def test_a_question_longer_than_the_models_positions_is_one_line(
    finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "POSITIONS", ("embed_tokens",))  # its rows act as learned positions
    with pytest.raises(ValueError, match=r"learned positions, got .* take a smaller --max-new-tokens, or a shorter"):
        list(ask.answers(finished("plain"), "copy red", max_new_tokens=200))


def test_a_run_is_asked_where_its_model_is(finished: Callable[[str], Path], tiny: Path, tmp_path: Path) -> None:
    """The model was a relative folder, and the question comes from another folder."""
    run = tmp_path / "run"
    shutil.copytree(finished("chat template"), run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"model: {tiny}", "model: elsewhere"))
    with pytest.raises(ValueError, match="cannot load --model 'elsewhere', expected a folder or hub id"):
        list(ask.answers(run, "copy red 1"))
    assert list(ask.answers(run, "copy red 1", max_new_tokens=2, base_model=str(tiny)))


def test_questions_are_read_line_by_line(finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished("chat template")
    questions = [row["prompt"] for row in json.loads((run / "answers.json").read_text())]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([questions[0], "", questions[1]]) + "\n"))
    assert list(ask.answers(run, None, max_new_tokens=3)) == [
        answer for question in questions[:2] for answer in ask.answers(run, question, max_new_tokens=3)
    ]


def test_what_cannot_be_asked_is_said(whole: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((whole, " "), "expected a question, got an empty one"),
        ((tmp_path, "x"), r"expected the folder of a finished run: .* has no summary\.json: repeat the command"),
        ((tmp_path / "no", "x"), "expected the folder of a finished run: .* does not exist in"),
        ((whole / "adapter", "x"), f"is an adapter: ask its run, {whole}"),
        ((whole, "x", None, None, None, "y"), "expected one question, as this run was trained on, got two"),
        ((whole, "x", "ann"), "--adapter has to name one of the run's adapters, got 'ann': it trained one"),
    ):
        with pytest.raises(ValueError, match=message):
            list(ask.answers(*arguments))
    summary = json.loads((whole / "summary.json").read_text())
    del summary["prompt_format"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="has no prompt format: an earlier version of lorasb wrote it"):
        list(ask.answers(tmp_path, "x"))
    assert call("ask", whole, "copy red 1", "--max-new-tokens", "2").strip()


def test_what_was_held_out_of_people_s_rows_is_said() -> None:
    summary = {"adapters": {"ada": {}}, "config": {"eval_data": None}, "eval_accuracy_after": 0.2}
    assert "cannot be learned: see --eval-data" in "".join(advice(summary))
    by_set = {"before": {}, "after": {}}
    of_f1 = {"eval_scores": ["f1"], "eval_accuracy_before": 0.0, "eval_accuracy_after": 0.5, "eval_examples": 10}
    of_f1 |= {"eval_loss_before": 1.0, "eval_loss_after": 1.0, "rank": 4, "config": {"method": "lora-sb"}}
    cells = before_and_after(of_f1 | {"eval_accuracy_by_set": by_set}).columns[2]._cells
    assert cells[1] == "50%"  # without a count of answers
    quiet = {"eval_accuracy_after": 1.0}, {"config": {"eval_data": "rows.jsonl"}}, {"adapters": {}}
    assert [list(advice(summary | one)) for one in quiet] == [[], [], []]


def test_the_command_can_be_pasted_whatever_a_prompt_has(tmp_path: Path) -> None:
    """A prompt from someone's data must not run in the user's shell or break the model card's code fences."""
    summary = {"adapters": {}, "prompt_format": ask.PLAIN, "classes": None, "rank": 4, "config": {"model": "m"}}
    question = 'a $(touch PWNED) `touch PWNED` "b" it\'s\n```'
    command = ask.how_to(summary, tmp_path / "my runs", Example(question, ""))["command"]
    printing = ["bash", "-c", command.replace("lorasb ask", "printf '%s\\n'", 1)]
    assert subprocess.check_output(printing, cwd=tmp_path, text=True).splitlines() == [
        str(tmp_path / "my runs"),
        *question.splitlines(),
    ]
    assert not (tmp_path / "PWNED").exists()
    assert ask.how_to(summary, tmp_path / "run")["command"].endswith(" QUESTION")
    of_several = ask.how_to(summary | {"adapters": {"grace": {}, "ada": {}}}, Path("run"))
    assert "'run/adapter/ada'" in of_several["python"]  # not the basis
    at_home = ask.how_to(summary | {"config": {"model": "~/m"}}, Path("run"))
    assert f"base = '{Path.home() / 'm'}'" in at_home["python"]
    of_demo = ask.how_to(summary | {"config": {"model": EMBEDDED}}, Path("run"))
    lora = "--enable-lora --max-lora-rank 8 --lora-modules adapter=run/lora"
    assert of_demo["serve"] == f"vllm serve {cache_dir() / EMBEDDED} {lora}"
    four = ask.how_to(summary | {"config": {"model": "m", "bits": 4}}, Path("run"))
    assert 'lorasb.quantize(transformers.AutoModelForCausalLM.from_pretrained(base), "nf4"' in four["python"]
    of_ranks = ask.how_to(summary | {"config": {"model": "m", "rank_pattern": {"down_proj": 24}}}, Path("run"))
    assert "--max-lora-rank 32" in of_ranks["serve"]
    assert of_several["serve"].startswith("LORASB_BASIS=run/adapter vllm serve m --enable-lora")
    on_basis = ask.how_to(summary | {"config": {"model": "m", "basis": "b"}}, Path("run"))
    served = "LORASB_BASIS=b vllm serve m --enable-lora --lora-modules adapter=run/adapter"
    assert on_basis["serve"] == served  # a run on a basis writes no plain LoRA
    grace = ask.how_to(
        summary | {"adapters": {"ada": {}, "grace": {}}}, Path("run"), Example("Where?", "", adapter="grace")
    )
    assert grace["command"] == "lorasb ask run 'Where?' --adapter grace"
    assert ask.how_to(summary | {"prompt_format": ask.INSTRUCTED}, tmp_path, Example(question, ""))["command"].endswith(
        " QUESTION"
    )
