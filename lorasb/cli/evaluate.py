"""Held-out loss and exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .encode import Collator, Encoded, positions
from .tasks import Example


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over examples (nats a token, each example's own mean), share of exact answers, and the answers."""

    loss: float
    accuracy: float
    answers: tuple[str, ...]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    batch_size: int,
    title: str,
) -> Evaluation:
    """Evaluate a model on examples; the model's mode is put back."""
    mode = model.training
    model.eval()
    losses: list[float] = []
    answers: list[str] = []
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    collate = Collator(tokenizer.pad_token_id, getattr(model, "get_base_model", lambda: model)())
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch", leave=False):
        chunk = [encoded[i] for i in order[start : start + batch_size]]
        losses += example_losses(model, collate(chunk))
        answers += _answers(model, tokenizer, chunk)
    model.train(mode)
    by_index = dict(zip(order, answers, strict=True))
    given = tuple(by_index[i] for i in range(len(order)))
    right = sum(answer == example.completion.strip() for answer, example in zip(given, examples, strict=True))
    return Evaluation(sum(losses) / len(losses), right / len(examples), given)


def example_losses(model: nn.Module, batch: dict[str, Any]) -> list[float]:
    """Each example's mean loss in nats a token; takes the batch's labels."""
    device = next(model.parameters()).device
    labels = batch.pop("labels")[:, 1:].to(device)
    logits = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def _answers(model: nn.Module, tokenizer: Any, chunk: Sequence[Encoded]) -> list[str]:
    """Greedy answers, no longer than the longest right one plus four tokens."""
    device = next(model.parameters()).device
    width = max(len(e.prompt) for e in chunk)
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (width - len(e.prompt)) + list(e.prompt) for e in chunk], device=device
    )
    mask = torch.tensor([[0] * (width - len(e.prompt)) + [1] * len(e.prompt) for e in chunk], device=device)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        max_new_tokens=max(len(e.completion) for e in chunk) + 4,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]
