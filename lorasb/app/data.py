"""A run's training and held-out examples, and a digest that identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from .named_data import read_data
from .settings import Settings
from .tasks import HELD_OUT_SEED, Example, generate


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; no held-out prompt is in the training set."""
    if settings.data is None:
        task = settings.generated_task
        held_out = generate(task, settings.eval_examples, HELD_OUT_SEED + settings.seed)
        return generate(task, settings.train_examples, settings.seed, exclude=held_out), held_out
    train_examples = read_data(settings.data, settings.score, adapter_column=settings.adapter_column)
    held_out = _held_out(settings, train_examples)
    # By prompt, not by position: duplicates of a held-out prompt must not be trained on either.
    prompts = {_prompt(example) for example in held_out}
    remaining = [example for example in train_examples if _prompt(example) not in prompts]
    if not remaining:
        raise ValueError(f"{settings.data} holds no example that is not held out: pass more, or a separate --eval-data")
    return remaining, held_out


def _prompt(example: Example) -> str:
    """Key of an example's question, whatever the answer; `messages` are dictionaries, which have no hash."""
    return json.dumps([example.prompt, example.pair, example.messages[:-1], example.adapter])


def _held_out(settings: Settings, train_examples: list[Example]) -> list[Example]:
    """Examples of each set of `--eval-data`, or else up to a tenth of the training set's; drawn at random."""
    if settings.eval_data is not None:
        column = settings.adapter_column
        parts = (read_data(name.strip(), settings.score, True, column) for name in settings.eval_data.split(","))
        return [example for part in parts for example in _drawn(part, settings.eval_examples, settings.seed)]
    return _drawn(train_examples, max(1, min(settings.eval_examples, len(train_examples) // 10)), settings.seed)


def _drawn(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` of the examples, or all of them in their order. By the seed alone: a resumed run holds out the same."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in order[:count]]


def digest(*parts: Sequence[Example]) -> str:
    """SHA-256 over lists of examples, in order."""
    text = json.dumps([[astuple(example) for example in part] for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()


def describe_data(settings: Settings, count: int) -> str:
    """The source and number of the training examples, as text."""
    if settings.data is not None:
        return f"{Path(settings.data).name}, {count} examples"
    return f"reasoning-gym {settings.generated_task}, {count} generated examples"


class Listed(torch.utils.data.Dataset[Any]):
    """A list as a map-style data set."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]
