"""Held-out loss and exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..distributed.process_group import Processes
from .launch import gather_json
from .tasks import Example
from .tokenization import Collator, Encoded, positions

MARGIN = 4  # tokens that an answer may be longer than the longest right one
ANSWERED = 8192  # tokens that are kept at once: a token more of many answers takes little longer than one of a few


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
    """Evaluate a model on examples; the model's mode is put back. Several processes take a part of the batches each."""
    loss = mean_loss(model, tokenizer.pad_token_id, encoded, batch_size, f"{title}: loss")
    mode = model.training
    model.eval()
    chunks = _chunks(encoded, max(batch_size, ANSWERED // max(len(one) + MARGIN for one in encoded)))
    found: dict[int, str] = {}

    def answer(numbers: list[int], bar: Any) -> list[str]:
        return _answers(model, tokenizer, [encoded[i] for i in numbers], bar)

    longest = [_longest_answer([encoded[i] for i in numbers]) for numbers in chunks]
    for numbers, values in _shared(chunks, answer, longest, f"{title}: answers", "token"):
        found |= dict(zip(numbers, values, strict=True))
    model.train(mode)
    given = tuple(found[i] for i in range(len(encoded)))
    right = sum(answer == example.completion.strip() for answer, example in zip(given, examples, strict=True))
    return Evaluation(loss, right / len(examples), given)


@torch.no_grad()
def mean_loss(
    model: nn.Module, pad_token_id: int, encoded: Sequence[Encoded], batch_size: int, title: str = ""
) -> float:
    """The mean loss alone, without answers; with a bar where there is a title."""
    mode = model.training
    model.eval()
    collate = Collator(pad_token_id, getattr(model, "get_base_model", lambda: model)())
    chunks = _chunks(encoded, batch_size)

    def call(numbers: list[int], bar: Any) -> list[float]:
        losses = example_losses(model, collate([encoded[i] for i in numbers]))
        bar.update(1)
        return losses

    every = _shared(chunks, call, [1] * len(chunks), title, "batch")
    losses = [loss for _, values in every for loss in values]
    model.train(mode)
    return sum(losses) / len(losses)


def _chunks(encoded: Sequence[Encoded], size: int) -> list[list[int]]:
    """Numbers of the examples of each batch, by their length."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _shared(
    chunks: list[list[int]], judge: Any, sizes: list[int], title: str, unit: str
) -> list[tuple[list[int], list[Any]]]:
    """Each batch's numbers and what `judge` gives for it, in order; every process judges a part.

    The bar counts units, of which each batch has its size.
    """
    processes = Processes()
    mine = range(processes.rank, len(chunks), processes.world_size)
    hidden = processes.rank > 0 or not title
    with tqdm(total=sum(sizes[k] for k in mine), desc=title, unit=unit, leave=False, disable=hidden) as bar:
        every = gather_json([judge(chunks[k], bar) for k in mine], processes)
    return [(numbers, every[k % processes.world_size][k // processes.world_size]) for k, numbers in enumerate(chunks)]


def example_losses(model: nn.Module, batch: dict[str, Any]) -> list[float]:
    """Each example's mean loss in nats a token; takes the batch's labels."""
    device = next(model.parameters()).device
    labels = batch.pop("labels")[:, 1:].to(device)
    logits = model(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def _longest_answer(chunk: Sequence[Encoded]) -> int:
    """Tokens that an answer of these may have: the longest right one's, and a margin."""
    return max(len(e.completion) for e in chunk) + MARGIN


def _answers(model: nn.Module, tokenizer: Any, chunk: Sequence[Encoded], bar: Any) -> list[str]:
    """Greedy answers; the bar moves with every token."""
    device = next(model.parameters()).device
    width = max(len(e.prompt) for e in chunk)
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * (width - len(e.prompt)) + list(e.prompt) for e in chunk], device=device
    )
    mask = torch.tensor([[0] * (width - len(e.prompt)) + [1] * len(e.prompt) for e in chunk], device=device)

    def moved(tokens: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        bar.update(1)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        max_new_tokens=_longest_answer(chunk),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[moved],
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]
