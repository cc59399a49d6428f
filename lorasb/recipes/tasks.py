"""Examples to learn from: generated reasoning tasks, or a JSONL file of the user's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_SEED = 10_000_000  # item i of a generated data set is drawn from seed + i: near seeds overlap
MAX_EMPTY_ROUNDS = 20


@dataclass(frozen=True)
class Task:
    """A reasoning-gym data set: its options, and whether its questions carry instructions that every item repeats."""

    options: dict[str, Any]
    question_only: bool = False


TASKS = {
    "word_sequence_reversal": Task({"min_words": 3, "max_words": 6}, question_only=True),
    "chain_sum": Task({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "leg_counting": Task({"max_animals": 3, "max_instances": 9}, question_only=True),
    "family_relationships": Task({}),
    "gcd": Task({"max_value": 99}),
}


@dataclass(frozen=True)
class Example:
    """A question and its answer: `prompt` and `completion`, or `messages` whose last one is the answer."""

    prompt: str
    completion: str
    messages: tuple[dict[str, str], ...] = ()


def generate(task: str, count: int, seed: int, exclude: Sequence[Example] = ()) -> list[Example]:
    """Draw `count` distinct examples of a reasoning-gym task, none with a prompt of `exclude`.

    Raises:
        ValueError: unknown task, or a task too small to give that many distinct prompts.
        ImportError: reasoning-gym is missing; the message has the pip command.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}, or give --data a JSONL file")
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("generated tasks need reasoning-gym: pip install 'lorasb[demo]'") from error
    seen = {example.prompt for example in exclude}
    found: list[Example] = []
    for attempt in range(MAX_EMPTY_ROUNDS):
        dataset = reasoning_gym.create_dataset(task, size=count, seed=seed + attempt * count, **TASKS[task].options)
        for item in dataset:
            prompt = item["question"].strip()
            if TASKS[task].question_only:
                prompt = prompt.rpartition("\n\n")[2]
            if prompt not in seen and len(found) < count:
                seen.add(prompt)
                found.append(Example(prompt, str(item["answer"]).strip()))
        if len(found) == count:
            return found
    raise ValueError(f"task {task!r} gave {len(found)} distinct prompts, {count} were asked for: ask for fewer")


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples: an object a line with `prompt` and `completion`, or with `messages` (role, content).

    Raises:
        ValueError: no such file, no example, or a line that is neither; the line's number is named.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"expected a JSONL file, found none at {file}")
    found = []
    # JSON may hold U+2028 and its like as they are, which splitlines() takes for ends of lines
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                found.append(_example(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{file}, line {number}: expected an object with prompt and completion, or messages ending with "
                    f"the assistant's ({error})"
                ) from None
    if not found:
        raise ValueError(f"{file} holds no examples")
    return found


def _example(values: Any) -> Example:
    if not isinstance(values, dict):
        raise TypeError(f"got {type(values).__name__}")
    if "messages" not in values:
        return Example(str(values["prompt"]), str(values["completion"]))
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in values["messages"]]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return Example(messages[-2]["content"], messages[-1]["content"], tuple(messages))
