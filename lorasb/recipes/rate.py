"""`--find-lr`: the learning rate of a run by trials on its own first batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..training.rate_trials import RateTrials, find_lr
from .console import console
from .prepare import Run, checkpoint_activations


def find_rate(run: Run) -> RateTrials:
    """Try rates from `--lr` on; leaves R at the start that the best one has. A collective: ranks find the same."""
    settings = run.settings
    if settings.gradient_checkpointing:
        checkpoint_activations(run.model.get_base_model())
    found = find_lr(run.model, batches(run), settings.lr, accumulation=settings.gradient_accumulation)
    console.print(str(found), highlight=False, soft_wrap=True)
    return found


def batches(run: Run) -> Iterator[dict[str, Any]]:
    """The run's batches in its order, over and over, in the parts that a step is computed in."""
    settings, collate = run.settings, run.unnamed_collator()
    size = settings.batch_size // settings.gradient_accumulation
    order = run.order()
    for epoch in itertools.count():
        for step in order.order(epoch):
            for start in range(0, len(step), size):
                yield collate([run.rows[i] for i in step[start : start + size]])
