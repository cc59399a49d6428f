"""Examples by name and by file: the hub is replaced by rows of its columns, and what cannot be read is said."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasb.app.data import MATH_SUBJECTS, NAMED, load_examples, read_data
from lorasb.app.scoring import is_right
from lorasb.app.settings import Settings

ROWS = {
    "meta-math/MetaMathQA": {
        "query": "What is 1 + 1?",
        "response": "It is 2. The answer is: 2",
        "type": "GSM_Rephrased",
    },
    "openai/gsm8k": {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "EleutherAI/hendrycks_math": {"problem": "Half?", "solution": r"\boxed{\frac{1}{2}}", "level": "Level 1"},
    "nyu-mll/glue": {
        "sentence": "It rains.",
        "question": "Does it?",
        "sentence1": "It rains.",
        "premise": "It rains.",
        "hypothesis": "It pours.",
        "question2": "It pours.",
        "question1": "It rains.",
        "sentence2": "It pours.",
        "label": 1,
        "idx": 0,
    },
    "zwhe99/commonsense_170k": {
        "instruction": "Is ice cold?",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    },
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """What was asked of the hub; every data set has one row."""
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [ROWS[path]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize("name", NAMED)
def test_a_named_set_has_prompts_answers_and_its_own_score(hub: list[Any], name: str) -> None:
    examples = read_data(name, "exact")
    assert {example.source for example in examples} == {name}
    assert {example.score for example in examples} == {NAMED[name].score}
    for example in examples:
        assert (example.label is not None) == (NAMED[name].path == "nyu-mll/glue")
        assert ("### Instruction:" in example.prompt) == (example.label is None)
        assert "### Input:" not in example.prompt  # Alpaca's other form is for rows that have one
        assert is_right(example.completion, example.completion, example.score)
    assert {path for path, _, _ in hub} == {NAMED[name].path}


def test_the_papers_share_of_metamath_and_all_subjects_of_math(hub: list[Any]) -> None:
    read_data("metamathqa", "exact")
    assert len(read_data("math", "exact", held_out=True)) == len(MATH_SUBJECTS)
    assert hub[0] == ("meta-math/MetaMathQA", None, "train[:50000]")
    assert hub[1:] == [("EleutherAI/hendrycks_math", subject, "test") for subject in MATH_SUBJECTS]


def test_what_is_held_out_has_a_split_of_its_own(hub: list[Any]) -> None:
    read_data("gsm8k", "exact")
    read_data("gsm8k", "exact", held_out=True)
    read_data("cola", "exact", held_out=True)
    assert [split for _, _, split in hub] == ["train", "test", "validation"]
    with pytest.raises(ValueError, match="metamathqa has no held-out split: name another set"):
        read_data("metamathqa", "exact", held_out=True)


def test_several_held_out_sets_each_give_so_many(hub: list[Any], data: Path) -> None:
    train, held_out = load_examples(Settings(data="metamathqa", eval_data=f"gsm8k, {data}", eval_examples=2))
    assert [example.source for example in held_out] == ["gsm8k", str(data), str(data)]
    assert [example.score for example in held_out] == ["number", "exact", "exact"]
    assert len(train) == 1


def test_a_file_goes_before_a_name(hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").write_text('{"prompt": "a", "completion": "b"}\n')
    (example,) = read_data("gsm8k", "choice")
    assert (example.prompt, example.score, hub) == ("a", "choice", [])


def test_a_json_list_has_instructions_and_inputs(tmp_path: Path) -> None:
    file = tmp_path / "boolq.json"
    file.write_text(json.dumps([{"instruction": "Translate", "input": "Haus", "output": "house", "answer": "x"}]))
    (example,) = read_data(str(file), "choice")
    assert "### Input:\nHaus\n" in example.prompt
    assert (example.completion, example.source, example.score) == ("house", str(file), "choice")


@pytest.mark.parametrize("text", ["[]", "{}", '[{"instruction": "a"}]', "[1]"])
def test_json_that_is_no_list_of_instructions_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON list of objects with instruction and output"):
        read_data(str(tmp_path / "a.json"), "exact")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(OSError, match=r"gsm8k cannot be read from the hub as openai/gsm8k: no route to host\. A JSONL"):
        read_data("gsm8k", "exact")


def test_a_missing_package_has_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_datasets(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(
        ImportError, match="metamathqa is read from the hub as meta-math/MetaMathQA: pip install datasets"
    ):
        read_data("metamathqa", "exact")


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    assert [example.completion for example in read_data(str(tmp_path / "a.json"), "exact")] == ["b", "d"]


def test_what_is_held_out_is_drawn_from_all_of_a_set(tmp_path: Path) -> None:
    """A set in order of its subjects must not be judged by the first of them."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "x"}) + "\n" for i in range(40)))
    found = [
        load_examples(Settings(eval_data=str(file), data=str(file), eval_examples=8, seed=s))[1] for s in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert found[0] != read_data(str(file), "exact")[:8]


def test_chats_are_held_out_by_their_messages(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i % 10}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(20)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = load_examples(Settings(data=str(tmp_path / "chat.jsonl")))
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert len(train) == 20 - 2 * len({e.prompt for e in held_out})


@pytest.mark.parametrize(
    ("labels", "score"), [([0, 1], "label"), (["a", "b"], "label"), ([0.5, 1], "pearson"), ([0.5, "a"], "label")]
)
def test_labels_have_a_score_of_their_own(tmp_path: Path, labels: list[Any], score: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels))
    assert {example.score for example in read_data(str(file), "exact")} == {score}
    assert {example.score for example in read_data(str(file), "matthews")} == {"matthews"}


def test_prompts_with_a_label_column_stay_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "label": 1}\n')
    (example,) = read_data(str(tmp_path / "a.jsonl"), "exact")
    assert (example.completion, example.label, example.score) == ("b", None, "exact")
