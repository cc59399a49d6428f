"""Generated tasks and JSONL files: no held-out problem is trained on, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasb.app import tasks


@pytest.mark.parametrize("task", tasks.TASKS)
def test_held_out_problems_are_never_trained_on(task: str) -> None:
    held_out = tasks.generate(task, 40, tasks.HELD_OUT_SEED)
    train = tasks.generate(task, 150, 0, exclude=held_out)
    prompts = [example.prompt for example in train]
    assert len(set(prompts)) == len(train) == 150
    assert not {example.prompt for example in held_out} & set(prompts)
    assert train == tasks.generate(task, 150, 0, exclude=held_out)
    assert all(example.prompt and example.completion for example in train)


def test_reversal_is_a_reversal() -> None:
    for example in tasks.generate("word_sequence_reversal", 20, 5):
        words = example.prompt.partition("words: ")[2].split(", ")
        assert example.completion == ", ".join(reversed(words))


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task 'leg_counting' gave \d+ distinct prompts|task 'gcd'"):
        tasks.generate("gcd", 20_000, 0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2"),
        ("[1]", "got list"),
        ('{"prompt": "a"}', "completion"),
        ('{"messages": []}', "not the assistant's"),
        ('{"prompt": "a", "completion": null}', "completion has to be a text, got 'None'"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "prompt has to be a text"),
        ('{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "content has to be a text"),
    ],
)
def test_lines_that_are_no_examples_are_named(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(ValueError, match="line 2: expected an object with prompt and completion") as caught:
        tasks.read_jsonl(tmp_path / "x.jsonl")
    assert why in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no examples"):
        tasks.read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x1c", "\r"])
def test_letters_that_end_a_line_elsewhere_are_kept(tmp_path: Path, letter: str) -> None:
    rows = [{"prompt": f"a{letter}b", "completion": "c"}, {"prompt": "d", "completion": f"e{letter}"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [(e.prompt, e.completion) for e in tasks.read_jsonl(tmp_path / "x.jsonl")] == [
        (row["prompt"], row["completion"]) for row in rows
    ]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 400])
@pytest.mark.parametrize("row", ['{"text": "a", "label": VALUE}', '{"prompt": VALUE, "completion": "b"}'])
def test_a_number_that_no_loss_can_take_names_its_line(tmp_path: Path, row: str, value: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": 1.5}\n' + row.replace("VALUE", value) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .*(finite number|Exceeds the limit)"):
        tasks.read_jsonl(file)
