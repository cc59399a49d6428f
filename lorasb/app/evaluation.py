"""Held-out evaluation: mean loss, and the share of greedily decoded answers that are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..distributed.process_group import Processes
from ..init.task import to_device
from .scoring import CORRELATIONS, is_right
from .tasks import Example
from .tokenize import Collator, Encoded, positions

ANSWER_MARGIN = 4  # tokens that a generated answer may be longer than the longest right one
# A checkpoint's own settings of generation would take other tokens than the likeliest.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# Tokens per generation batch: a decoding step takes little longer for many rows than for a few.
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Evaluation:
    """Mean over examples of the loss (of a language model: nats per token), the score, and the answers.

    `accuracy` is the share of right answers, or the correlation that the examples' score names.
    """

    loss: float
    accuracy: float
    answers: tuple[str, ...]

    @classmethod
    def of(cls, loss: Any, accuracy: Any, answers: Any) -> Evaluation:
        """From a file's values."""
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise TypeError("expected answers as texts")
        return cls(float(loss), float(accuracy), tuple(answers))


@dataclass(frozen=True)
class HeldOut:
    """Examples, as text and encoded, how many make a batch, and the limit on new tokens (None: see `evaluate`)."""

    examples: Sequence[Example]
    encoded: Sequence[Any]
    batch_size: int
    limit: int | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    batch_size: int,
    title: str,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """Evaluate a model on examples, split over ranks by batches; restores the model's train or eval mode."""
    # Answers end after `max_new_tokens`, or, without a limit, 4 tokens after the longest right answer of their batch.
    loss = mean_loss(model, tokenizer.pad_token_id, encoded, batch_size, f"{title}: loss")
    mode = model.training
    model.eval()
    answers = _all_answers(model, tokenizer, encoded, batch_size, f"{title}: answers", max_new_tokens)
    model.train(mode)
    return Evaluation(loss, score_of(examples, answers), answers)


def score_of(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """The share of right answers, or the correlation that the examples' score names."""
    scores = {example.score for example in examples}
    pairs = [(answer, example.completion) for example, answer in zip(examples, answers, strict=True)]
    if len(scores) == 1 and (score := scores.pop()) in CORRELATIONS:
        return CORRELATIONS[score](pairs)
    right = [is_right(*pair, e.score) for pair, e in zip(pairs, examples, strict=True)]
    return sum(right) / len(right)


def score_by_source(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """The score of each data set, where there are several."""
    scores = score_by("source", examples, answers)
    return scores if len(scores) > 1 else {}


def score_by(field: str, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """The score of the examples that have the same `source`, or the same `adapter`, by that."""
    parts: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        parts.setdefault(getattr(example, field), []).append(i)
    return {name: score_of([examples[i] for i in part], [answers[i] for i in part]) for name, part in parts.items()}


def _all_answers(
    model: nn.Module, tokenizer: Any, encoded: Sequence[Encoded], batch_size: int, title: str, limit: int | None
) -> tuple[str, ...]:
    """The model's answer to each example, in the examples' order."""
    longest_row = max(len(ids.prompt) + token_limit([ids], limit) for ids in encoded)
    # Generation keeps no activations, so its batches may be larger than those of the loss.
    chunks = batches_by_length(encoded, max(batch_size, TOKENS_PER_BATCH // longest_row))
    answer_by_index: dict[int, str] = {}

    def generate(indices: list[int], bar: Any) -> list[str]:
        return generate_answers(model, tokenizer, [encoded[i] for i in indices], bar, limit)

    token_limits = [token_limit([encoded[i] for i in indices], limit) for indices in chunks]
    for indices, texts in map_over_ranks(chunks, generate, token_limits, title, "token"):
        answer_by_index |= dict(zip(indices, texts, strict=True))
    return tuple(answer_by_index[i] for i in range(len(encoded)))


@torch.no_grad()
def mean_loss(
    model: nn.Module, pad_token_id: int, encoded: Sequence[Encoded], batch_size: int, title: str = ""
) -> float:
    """The mean loss alone, without generation; shows a progress bar if there is a title."""
    mode = model.training
    model.eval()
    # The signature of PeftModel.forward lacks logits_to_keep, so the collator looks at the base model's.
    collate = Collator(pad_token_id, getattr(model, "get_base_model", lambda: model)())
    chunks = batches_by_length(encoded, batch_size)

    def batch_losses(indices: list[int], bar: Any) -> list[float]:
        """The losses of one batch; advances the bar."""
        rows = [encoded[i] for i in indices]
        losses = example_losses(model, collate(rows) | adapters_of(model, rows))
        bar.update(1)
        return losses

    results = map_over_ranks(chunks, batch_losses, [1] * len(chunks), title, "batch")
    losses = [loss for _, losses_of_batch in results for loss in losses_of_batch]
    model.train(mode)
    return sum(losses) / len(losses)


def adapters_of(model: Any, rows: Sequence[Encoded]) -> dict[str, list[str]]:
    """The rows' `adapter_names`, for a model that has adapters of these names; nothing for any other."""
    names = [row.adapter for row in rows]
    return {"adapter_names": names} if set(names) <= set(getattr(model, "peft_config", ())) else {}


def batches_by_length(encoded: Sequence[Any], size: int) -> list[list[int]]:
    """Indices of the examples in each batch; batches are sorted by length, to save padding."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def map_over_ranks(
    chunks: list[list[int]], function: Any, sizes: list[int], title: str, unit: str
) -> list[tuple[list[int], list[Any]]]:
    """(indices, results of `function`) of each batch, in order; rank k computes batches k, k + world_size, ..."""
    # The progress bar is over `sizes`, the number of units in each batch.
    processes = Processes()
    own_batches = range(processes.rank, len(chunks), processes.world_size)
    hidden = processes.rank > 0 or not title
    with tqdm(total=sum(sizes[k] for k in own_batches), desc=title, unit=unit, leave=False, disable=hidden) as bar:
        results_by_rank = processes.gather_json([function(chunks[k], bar) for k in own_batches])
    # batch k is the (k // world_size)-th result of rank k % world_size
    return [
        (indices, results_by_rank[k % processes.world_size][k // processes.world_size])
        for k, indices in enumerate(chunks)
    ]


def example_losses(model: nn.Module, batch: dict[str, Any]) -> list[float]:
    """Each example's mean loss in nats per token; removes `labels` from the batch."""
    # Without labels the model computes no loss, whose mean would be over all tokens of the batch.
    device = next(model.parameters()).device
    labels = batch.pop("labels")[:, 1:].to(device)
    logits = model(**to_device(batch, device)).logits[:, :-1]
    # fp32: bf16 logits would round each token's loss; [batch, vocabulary, tokens] is cross_entropy's layout
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def token_limit(chunk: Sequence[Encoded], limit: int | None) -> int:
    """The limit on new tokens for a batch: the one given, or the length of its longest right answer and a margin."""
    return limit or max(len(e.completion) for e in chunk) + ANSWER_MARGIN


def generate_answers(
    model: nn.Module, tokenizer: Any, chunk: Sequence[Encoded], bar: Any, limit: int | None
) -> list[str]:
    """Greedily decoded answers; the bar advances with every token."""
    ids, mask = _padded_prompts(chunk, tokenizer.pad_token_id, next(model.parameters()).device)

    # generate() calls stopping criteria once per token; this one advances the bar and never stops.
    def advance(tokens: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        bar.update(1)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask),
        max_new_tokens=token_limit(chunk, limit),
        **GREEDY,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[advance],
        **adapters_of(model, chunk),
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)]


def _padded_prompts(chunk: Sequence[Encoded], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of the prompts, padded on the left."""
    width = max(len(e.prompt) for e in chunk)
    ids = [[pad] * (width - len(e.prompt)) + list(e.prompt) for e in chunk]
    mask = [[0] * (width - len(e.prompt)) + [1] * len(e.prompt) for e in chunk]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
