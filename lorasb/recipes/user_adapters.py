"""`--adapter-column`: an adapter for each name in the data, on one basis, all trained in the same batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from ..tuner import basis_adapters
from .prepare import Run
from .problems.evaluation import score_by


def add_adapters(run: Run) -> None:
    """Add an adapter for each name, on the basis that was initialized with the examples of all: its A, B and start."""
    import lorasb

    lorasb.add_adapters(run.model, run.adapters, basis_start="same")


def load_adapters(run: Run, folder: Path) -> None:
    """Load each name's R from its folder beside the basis; these train, and the basis's own R does not."""
    import lorasb

    if run.adapters:
        basis_adapters.load_adapters(run.model, folder, run.adapters)
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
    trained, held_out = (Counter(example.adapter for example in part) for part in (run.train, run.held_out))
    scores = {at: score_by("adapter", run.held_out, said) for at, said in (("before", before), ("after", after))}
    return {
        name: {"train_examples": trained[name], "eval_examples": held_out[name]}
        | {at: found[name] for at, found in scores.items() if name in found}
        for name in run.adapters
    }
