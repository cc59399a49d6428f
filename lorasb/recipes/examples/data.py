"""A run's training and held-out examples, and a digest that identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from ..settings import Settings
from .named_data import read_data
from .tasks import HELD_OUT_SEED, Example, generate


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; no held-out prompt is in the training set.

    Raises:
        ValueError: a file without examples, or no example left to train on.
    """
    if settings.data is None:
        held_out = generate(settings.task, settings.eval_examples, HELD_OUT_SEED + settings.seed)
        return generate(settings.task, settings.train_examples, settings.seed, exclude=held_out), held_out
    train_examples = read_data(settings.data, settings.score)
    held_out = _held_out(settings, train_examples)
    # By prompt, not by position: duplicates of a held-out prompt must not be trained on either.
    prompts = {(example.prompt, example.pair, example.messages) for example in held_out}
    remaining = [e for e in train_examples if (e.prompt, e.pair, e.messages) not in prompts]
    if not remaining:
        raise ValueError(f"{settings.data} holds no example that is not held out: pass more, or --eval-data of its own")
    return remaining, held_out


def _held_out(settings: Settings, train_examples: list[Example]) -> list[Example]:
    """The examples of `--eval-data`, the first of each set, or else up to a tenth of the training set's at random."""
    if settings.eval_data is not None:
        parts = (read_data(name.strip(), settings.score, held_out=True) for name in settings.eval_data.split(","))
        return [example for part in parts for example in part[: settings.eval_examples]]
    # By the seed alone, so that a resumed run holds out the same examples.
    order = torch.randperm(len(train_examples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    count = max(1, min(settings.eval_examples, len(train_examples) // 10))
    return [train_examples[i] for i in order[:count]]


def digest(*parts: Sequence[Example]) -> str:
    """SHA-256 over lists of examples, in order."""
    text = json.dumps([[astuple(example) for example in part] for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()


def describe_data(settings: Settings, count: int) -> str:
    """The source and number of the training examples, as text."""
    if settings.data is not None:
        return f"{Path(settings.data).name}, {count} examples"
    return f"reasoning-gym {settings.task}, {count} generated examples"


class Listed(torch.utils.data.Dataset[Any]):
    """A list as a map-style data set."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]
