"""Examples: generated, from files and by name; a fake hub has rows of the real columns; unreadable data is refused."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from tiny_run import write_rows

from lorasb.app.data import HELD_OUT_SEED, MATH_SUBJECTS, NAMED, digest, generate, load_examples, read_data, read_jsonl
from lorasb.app.finetune import run_finetune
from lorasb.app.scoring import is_right
from lorasb.app.settings import TASKS, Settings

GLUE = ("sentence", "sentence1", "sentence2", "question", "question1", "question2", "premise", "hypothesis")
ROWS = {
    "meta-math/MetaMathQA": {"query": "What is 1 + 1?", "response": "It is 2. The answer is: 2", "type": "GSM_Rephrased"},
    "openai/gsm8k": {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "EleutherAI/hendrycks_math": {"problem": "Half?", "solution": r"\boxed{\frac{1}{2}}", "level": "Level 1"},
    "nyu-mll/glue": dict.fromkeys(GLUE, "It rains.") | {"label": 1, "idx": 0},
    "zwhe99/commonsense_170k": {"instruction": "Is ice cold?", "input": "", "output": "the correct answer is true", "answer": "true"},
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """The requests to a fake hub, where every data set has one row."""
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [ROWS[path]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize("name", NAMED)
def test_a_named_set_has_prompts_answers_and_its_own_score(hub: list[Any], name: str) -> None:
    examples = read_data(name, "exact")
    assert {(example.source, example.score) for example in examples} == {(name, NAMED[name].score)}
    for example in examples:
        assert (example.label is not None) == (NAMED[name].path == "nyu-mll/glue")
        assert ("### Instruction:" in example.prompt) == (example.label is None)
        assert "### Input:" not in example.prompt  # Alpaca's other form is for rows with an input
        assert is_right(example.completion, example.completion, example.score)
    assert {path for path, _, _ in hub} == {NAMED[name].path}


def test_the_papers_share_of_metamath_all_subjects_of_math_and_splits(hub: list[Any]) -> None:
    for name, held_out in (("metamathqa", False), ("gsm8k", False), ("gsm8k", True), ("cola", True)):
        read_data(name, "exact", held_out=held_out)
    assert hub[0] == ("meta-math/MetaMathQA", None, "train[:50000]")
    assert [split for _, _, split in hub[1:]] == ["train", "test", "validation"]
    assert len(read_data("math", "exact", held_out=True)) == len(MATH_SUBJECTS)
    assert hub[4:] == [("EleutherAI/hendrycks_math", subject, "test") for subject in MATH_SUBJECTS]
    with pytest.raises(ValueError, match="metamathqa has no held-out split: name another set"):
        read_data("metamathqa", "exact", held_out=True)


def test_several_held_out_sets_each_give_so_many(hub: list[Any], data: Path) -> None:
    train, held_out = load_examples(Settings(data="metamathqa", eval_data=f"gsm8k, {data}", eval_examples=2))
    assert [(e.source, e.score) for e in held_out] == [("gsm8k", "number"), *[(str(data), "exact")] * 2]
    assert len(train) == 1
    asked = Settings(data="metamathqa", eval_data="gsm8k", score="symbolic")
    assert {e.score for e in load_examples(asked)[1]} == {"symbolic"}


def test_a_file_goes_before_a_name(hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("gsm8k"), [{"prompt": "a", "completion": "b"}])
    (example,) = read_data("gsm8k", "choice")
    assert (example.prompt, example.score, hub) == ("a", "choice", [])


def test_a_hub_that_does_not_answer_and_a_missing_package_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = Mock(side_effect=ConnectionError("no route\nto host"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(OSError, match=r"gsm8k cannot be read from the hub as openai/gsm8k: no route to host\. A JSONL"):
        read_data("gsm8k", "exact")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="gsm8k is read from the hub as openai/gsm8k: pip install datasets"):
        read_data("gsm8k", "exact")


def test_a_json_file_has_a_list_of_instructions_and_inputs_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "boolq.json"
    file.write_text(json.dumps([{"instruction": "Translate", "input": "Haus", "output": "house", "answer": "x"}]))
    (example,) = read_data(str(file), "choice")
    assert "### Input:\nHaus\n" in example.prompt
    assert (example.completion, example.source, example.score) == ("house", str(file), "choice")
    write_rows(file, [{"instruction": "Double it", "input": 0, "output": 0}, {"text": "a", "text_pair": 0, "label": 1}])
    doubled, pair = read_data(str(file), "exact")
    assert "### Input:\n0\n" in doubled.prompt
    assert pair.pair == "0"
    write_rows(file, ({"prompt": "a", "completion": text, "instruction": "c"} for text in "bd"))
    assert [example.completion for example in read_data(str(file), "exact")] == ["b", "d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no examples"),
        ("{}", "line 1: expected an object with prompt and completion.*it has nothing"),
        ('[{"instruction": "a"}]', "row 1: expected an object with .*instruction and output; it has instruction, but"),
        ("[1]", "row 1: expected an object .* got int"),
        ("[1", "this is not valid JSON"),
    ],
)
def test_json_that_is_no_list_of_examples_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        read_data(str(tmp_path / "a.json"), "exact")


GOOD = '{"prompt": "a", "completion": "b"}\n'
LINE_2 = "line 2: expected an object with prompt and completion.*"
NO_NUMBER = r"rows\.jsonl, line 2: .*(finite number|Exceeds the limit)"
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e400", "1" * 400)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples"),
        ("\n", "holds no examples"),
        (GOOD + "{", LINE_2),
        (GOOD + "[1]", LINE_2 + "got list"),
        (GOOD + '{"prompt": "a"}', LINE_2 + "completion"),
        (GOOD + '{"messages": []}', LINE_2 + "not the assistant's"),
        (GOOD + '{"messages": 5}', LINE_2 + "messages has to be a list, got int"),
        (GOOD + '{"instruction": "a", "input": ["b"], "output": "c"}', LINE_2 + "input has to be a text"),
        (GOOD + '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]}', LINE_2 + "tools and tool_calls are not read"),
        (GOOD + '{"prompt": "a", "completion": null}', LINE_2 + "completion has to be a text, got 'None'"),
        (GOOD + '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', LINE_2 + "prompt has to be a text"),
        (GOOD + '{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', LINE_2 + "content has to be a text"),
        *((row, r"rows\.jsonl, line 1: expected an object with .*text and label") for row in ('{"text": "a", "label": true}', '{"text": "a", "label": null}', '{"label": 1}')),
        *((f'{{"text": "a", "label": 1.5}}\n{{"text": "a", "label": {value}}}', NO_NUMBER) for value in NUMBERS),
        *((f'{GOOD}{{"prompt": {value}, "completion": "b"}}', NO_NUMBER) for value in NUMBERS),
    ],
)  # fmt: skip
def test_a_line_that_is_no_example_is_named(base: Settings, tmp_path: Path, text: str, message: str) -> None:
    file, output = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        run_finetune(replace(base, data=str(file), output=str(output)))
    assert not output.exists()


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x1c", "\r"])
def test_letters_that_end_a_line_elsewhere_are_kept(tmp_path: Path, letter: str) -> None:
    rows = [{"prompt": f"a{letter}b", "completion": "c"}, {"prompt": "d", "completion": f"e{letter}"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8", newline="")
    found = [{"prompt": e.prompt, "completion": e.completion} for e in read_jsonl(tmp_path / "x.jsonl")]
    assert found == rows


def test_what_is_held_out_is_drawn_from_all_of_a_set(tmp_path: Path) -> None:
    """A set sorted by subject must not be evaluated on its first subjects only."""
    file = write_rows(tmp_path / "a.jsonl", ({"prompt": f"q{i}", "completion": "x"} for i in range(40)))
    settings = Settings(eval_data=file, data=file, eval_examples=8)
    found = [load_examples(replace(settings, seed=seed))[1] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0] != read_data(file, "exact")[:8]


ROWS_OF: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "prompts": lambda i, prompts: {"prompt": f"q{i % prompts}", "completion": str(i)},
    "chats": lambda i, prompts: {"messages": [{"role": "user", "content": f"q{i % prompts}"}, {"role": "assistant", "content": f"a{i}"}]},
    "texts": lambda i, _: {"prompt": "", "completion": f"text {i}"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "prompts", "kept"),
    [*(("prompts", *counts) for counts in ((40, 36), (20, 36), (10, 36), (4, 30), (2, 20))), ("chats", 20, 36), ("texts", 40, 36)],
)  # fmt: skip
def test_all_rows_of_a_prompt_are_held_out_or_none(tmp_path: Path, kind: str, prompts: int, kept: int) -> None:
    """A tenth of the rows; if every prompt has more, some of one prompt's rows, and its other rows are left out."""
    rows = (ROWS_OF[kind](i, prompts) for i in range(40))
    train, held_out = load_examples(Settings(data=write_rows(tmp_path / "a.jsonl", rows)))
    assert (len(train), len(held_out)) == (kept, 4)
    assert kind == "texts" or not {e.prompt for e in train} & {e.prompt for e in held_out}


@pytest.mark.parametrize(("count", "why"), [(1, "too few examples"), (9, "one prompt in all of its 9 rows")])
def test_nothing_to_hold_out_is_named(tmp_path: Path, count: int, why: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": str(i)} for i in range(count)])
    with pytest.raises(ValueError, match=f"has {why}: add others to hold some out, or name held-out rows by"):
        load_examples(Settings(data=file))


def test_of_people_with_a_row_each_nothing_is_held_out_and_not_for_their_prompts(tmp_path: Path) -> None:
    rows = ({"prompt": f"q{i}", "completion": "a", "user": f"u{i}"} for i in range(10))
    settings = Settings(data=write_rows(tmp_path / "a.jsonl", rows), adapter_column="user")
    with pytest.raises(ValueError, match="has too few examples: add others to hold some out"):
        load_examples(settings)
    with pytest.raises(ValueError, match="--eval-data names no file: ','"):
        load_examples(replace(settings, eval_data=","))


@pytest.mark.parametrize(
    ("labels", "score"), [([0, 1], "label"), (["a", "b"], "label"), ([0.5, 1], "pearson"), ([0.5, "a"], "label")]
)
def test_labels_have_a_score_of_their_own(tmp_path: Path, labels: list[Any], score: str) -> None:
    file = write_rows(tmp_path / "a.jsonl", ({"text": "t", "label": label} for label in labels))
    assert {example.score for example in read_data(file, "exact")} == {score}
    assert {example.score for example in read_data(file, "matthews")} == {"matthews"}
    whole = write_rows(tmp_path / "b.jsonl", [{"text": "u", "label": 1}])
    held_out = load_examples(Settings(data=str(file), eval_data=str(whole)))[1]
    assert held_out[0].score == ("pearson" if score == "pearson" else "label")


def test_prompts_with_a_label_column_stay_prompts(tmp_path: Path) -> None:
    (example,) = read_data(write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": 1}]), "exact")
    assert (example.completion, example.label, example.score) == ("b", None, "exact")


@pytest.mark.parametrize("task", TASKS)
def test_held_out_problems_are_never_trained_on(task: str) -> None:
    held_out = generate(task, 40, HELD_OUT_SEED)
    train = generate(task, 150, 0, exclude=held_out)
    prompts = [example.prompt for example in train]
    assert len(set(prompts)) == len(train) == 150
    assert not {example.prompt for example in held_out} & set(prompts)
    assert train == generate(task, 150, 0, exclude=held_out)
    assert all(example.prompt and example.completion for example in train)


def test_more_problems_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [{"question": f"q{i % 3}", "answer": "x"} for i in range(9)]
    monkeypatch.setattr("lorasb.app.data.data_set", lambda *given: few)
    with pytest.raises(ValueError, match="task 'gcd' gave 3 distinct prompts, 5 were asked for: ask for fewer"):
        generate("gcd", 5, 0)


def test_a_file_has_one_digest_whatever_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_rows(tmp_path / "mine.jsonl", [{"prompt": "Two and two?", "completion": "4"}])
    found = digest(read_data(name, "exact"))
    monkeypatch.chdir(tmp_path)
    assert digest(read_data("mine.jsonl", "exact")) == found
    write_rows(tmp_path / "mine.jsonl", [{"prompt": "Two and two?", "completion": "5"}])
    assert digest(read_data(name, "exact")) != found
