"""Many people: what is asked of them later is in no training row, and who comes later changes nobody."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.serving.people import FACTS, rows, write


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_held_out_questions_are_new_and_their_answers_known(tmp_path: Path) -> None:
    write(tmp_path, 30)
    people, held_out = read(tmp_path / "people.jsonl"), read(tmp_path / "held_out.jsonl")
    assert len({row["user"] for row in people}) == 30
    assert (len(people), len(held_out)) == (30 * 2 * len(FACTS), 60)
    assert not {row["prompt"] for row in people} & {row["prompt"] for row in held_out}
    known = {(row["user"], row["completion"]) for row in people}
    assert all((row["user"], row["completion"]) in known for row in held_out)
    answers = {row["prompt"]: set() for row in people}
    for row in people:
        answers[row["prompt"]].add(row["completion"])
    assert all(len(found) > 5 for found in answers.values())  # no adapter for all could know them


def test_who_comes_later_changes_nobody(tmp_path: Path) -> None:
    write(tmp_path / "few", 10)
    write(tmp_path / "more", 20)
    few, more = (read(tmp_path / name / "people.jsonl") for name in ("few", "more"))
    assert few == more[: len(few)]
    assert read(tmp_path / "few" / "newcomer.jsonl") == rows("newcomer")[0]
