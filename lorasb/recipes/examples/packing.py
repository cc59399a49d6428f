"""Packing: several short examples in one row, without attention between them (block-diagonal by position_ids)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .tokenization import IGNORED, Encoded

Pack = tuple[Encoded, ...]
# Relative to the largest logit: bf16 rounds to 0.4%, while attention across examples changes logits far more.
TOLERANCE = 0.05


def pack(examples: Sequence[Encoded], length: int) -> list[Pack]:
    """Pack examples into rows of up to `length` tokens: first fit, in order of decreasing length."""
    rows: list[list[Encoded]] = []
    free_tokens: list[int] = []
    for example in sorted(examples, key=len, reverse=True):
        row_index = next((i for i, tokens in enumerate(free_tokens) if tokens >= len(example)), None)
        if row_index is None:
            rows.append([])
            free_tokens.append(length)
            row_index = len(rows) - 1
        rows[row_index].append(example)
        free_tokens[row_index] -= len(example)
    return [tuple(row) for row in rows]


def row_length(row: Any) -> int:
    """Number of tokens of an example or a pack."""
    return sum(map(len, row)) if isinstance(row, tuple) else len(row)


class PackCollator:
    """Collates packs, padded on the right. Positions restart at 0 in each example, and no attention mask is passed:

    transformers derives the block-diagonal mask from restarting position_ids only without an attention mask.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad = pad_token_id

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        width = max(row_length(row) for row in packs)
        ids, labels, positions = [], [], []
        for row in packs:
            fill = width - row_length(row)
            ids.append([t for e in row for t in (*e.prompt, *e.completion)] + [self.pad] * fill)
            # the first token has no label: the logit before it belongs to the example before
            labels.append([t for e in row for t in (IGNORED, *e.labels[1:])] + [IGNORED] * fill)
            # padding counts from 0 again: to attention it is one more example, without labels
            positions.append([i for e in row for i in range(len(e))] + list(range(fill)))
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor(positions),
            "use_cache": False,  # transformers looks for packed position_ids only without a KV cache
        }


@torch.no_grad()
def check_model(model: nn.Module) -> None:
    """Compare the logits of a packed example with those of the example alone.

    Raises:
        ValueError: the model attends across packed examples, or takes no position_ids.
    """
    mode = model.training
    model.eval()
    try:
        packed_logits, single_logits = _packed_and_single_logits(model)
    except TypeError as error:
        raise ValueError(f"--packing: this model takes no position_ids ({error}): train without it") from None
    finally:
        model.train(mode)
    if (packed_logits - single_logits).abs().max() > TOLERANCE * single_logits.abs().max():
        raise ValueError(
            f"--packing: in a {type(model).__name__} packed examples see one another, as its attention does not follow "
            "position_ids: train without it"
        )


def _packed_and_single_logits(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of an example that follows another one in its row, and of the example alone."""
    device = next(model.parameters()).device
    first, second = Encoded((5, 6, 7), (8, 9)), Encoded((9, 8), (7, 6, 5))
    batch = PackCollator(0)([(first, second)])
    ids, position_ids = batch["input_ids"].to(device), batch["position_ids"].to(device)
    packed_logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0, len(first) :].float()
    second_ids = torch.tensor([[*second.prompt, *second.completion]], device=device)
    return packed_logits, model(input_ids=second_ids).logits[0].float()
