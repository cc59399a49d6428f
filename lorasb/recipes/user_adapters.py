"""`--adapter-column`: an adapter for each name in the data, on one basis, all trained in the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .examples.tasks import Example
from .prepare import Run
from .problems.evaluation import score_of


def add_adapters(run: Run) -> None:
    """Add an adapter for each name, on the basis that was initialized with the examples of all: its A, B and start."""
    import lorasb

    for name in run.adapters:
        run.model.add_adapter(name, lorasb.LoRASBConfig(basis="default", basis_start="same"))


def load_adapters(run: Run, folder: Path) -> None:
    """Load each name's R from its folder beside the basis; these train, and the basis's own R does not."""
    import lorasb

    for name in run.adapters:
        run.model.load_adapter(str(folder / name), name, is_trainable=True)
    if run.adapters:
        lorasb.adapter_parameter_groups(run.model, run.adapters, run.lr)


def optimizer(run: Run, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The trainer's optimizer, with a group for each adapter."""
    import lorasb

    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = lorasb.adapter_parameter_groups(run.model, run.adapters, run.lr, weight_decay=arguments.weight_decay)
    return kind(groups, **options)


def by_adapter(run: Run, before: Sequence[str], after: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Training examples of each adapter, and the scores of its held-out ones before and after."""
    if not run.adapters:
        return {}
    trained: dict[str, int] = dict.fromkeys(run.adapters, 0)
    held_out: dict[str, list[int]] = {name: [] for name in run.adapters}
    for example in run.train:
        trained[example.adapter] += 1
    for i, example in enumerate(run.held_out):
        held_out[example.adapter].append(i)
    return {
        name: {"train_examples": trained[name], "eval_examples": len(rows)}
        | (_scores(run.held_out, rows, before, after) if rows else {})
        for name, rows in held_out.items()
    }


def _scores(
    examples: Sequence[Example], rows: Sequence[int], before: Sequence[str], after: Sequence[str]
) -> dict[str, float]:
    mine = [examples[i] for i in rows]
    return {at: score_of(mine, [answers[i] for i in rows]) for at, answers in (("before", before), ("after", after))}
