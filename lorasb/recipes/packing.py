"""Packs: several short examples in one row, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .tokenization import IGNORED, Encoded

Pack = tuple[Encoded, ...]
TOLERANCE = 0.05  # of the largest logit: bf16 rounds to 0.4%, and an example that sees another is off by far more


def pack(examples: Sequence[Encoded], length: int) -> list[Pack]:
    """Put each example into the first row that it fits in, the longest first; rows have up to `length` tokens."""
    rows: list[list[Encoded]] = []
    left: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        at = next((i for i, tokens in enumerate(left) if tokens >= len(example)), None)
        if at is None:
            rows.append([])
            left.append(length)
            at = len(rows) - 1
        rows[at].append(example)
        left[at] -= len(example)
    return [tuple(row) for row in rows]


def row_length(row: Any) -> int:
    """Tokens of an example or of a pack."""
    return len(row) if isinstance(row, Encoded) else sum(map(len, row))


class PackCollator:
    """Batches of packs, padded on the right. Positions begin anew with each example; there is no mask to hide that."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad = pad_token_id

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        width = max(row_length(row) for row in packs)
        ids, labels, positions = [], [], []
        for row in packs:
            fill = width - row_length(row)
            ids.append([t for e in row for t in (*e.prompt, *e.completion)] + [self.pad] * fill)
            # an example's first token is predicted from nothing, never from the example before it
            labels.append([t for e in row for t in (IGNORED, *e.labels[1:])] + [IGNORED] * fill)
            positions.append([i for e in row for i in range(len(e))] + list(range(fill)))
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor(positions),
            "use_cache": False,  # models look for packs where they keep nothing
        }


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Hold a pack against its examples alone.

    Raises:
        ValueError: the model lets packed examples see one another.
    """
    where, mode = next(model.parameters()).device, model.training
    model.eval()
    first, second = Encoded((5, 6, 7), (8, 9)), Encoded((9, 8), (7, 6, 5))
    try:
        batch = PackCollator(0)([(first, second)])
        ids, at = batch["input_ids"].to(where), batch["position_ids"].to(where)
        together = model(input_ids=ids, position_ids=at, use_cache=False).logits[0, len(first) :].float()
        alone = model(input_ids=torch.tensor([[*second.prompt, *second.completion]], device=where)).logits[0].float()
    except TypeError as error:
        raise ValueError(f"--packing: this model takes no position_ids ({error}): train without it") from None
    finally:
        model.train(mode)
    if (together - alone).abs().max() > TOLERANCE * alone.abs().max():
        raise ValueError(
            f"--packing: in a {type(model).__name__} packed examples see one another, as its attention does not follow "
            "position_ids: train without it"
        )
