"""Language modeling and classification of labeled texts, the two kinds of run, and their held-out evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..constants import IGNORED
from ..distributed.process_group import Processes
from ..init.sampling import Batch
from ..init.task import modes_restored, to_device
from ..serving.training import token_losses
from ..training.reinforcement import ends_of
from ..tuner.targets import missing_from_checkpoint
from .data import Example, are_values
from .scoring import CORRELATIONS, LABEL_SCORES, OF_VALUES, SCORES, in_order, is_right, number
from .settings import Settings
from .tokenize import Collate, Collator, Encoded, EncodedText, Rows, collate_prompts, collate_texts, encode

T = TypeVar("T")
ANSWER_MARGIN = 4  # extra tokens of a generated answer over the longest right one
# Overrides a checkpoint's generation settings, which may not pick the likeliest tokens.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# Tokens per generation batch: a decoding step takes little longer for many rows than for a few.
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and score over held-out examples, and the answers."""

    loss: float  # for language models, in nats per token
    accuracy: float  # the share of right answers, or the correlation named by the examples' score
    answers: list[str]


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples."""

    examples: Sequence[Example]
    encoded: Rows
    batch_size: int
    limit: int | None = None  # on new tokens; None: 4 more than the longest right answer of a batch


def score_of(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Return the share of right answers, or the correlation named by the examples' score."""
    scores = {example.score for example in examples}
    pairs = [(answer, example.completion) for example, answer in zip(examples, answers, strict=True)]
    if len(scores) == 1 and (score := scores.pop()) in CORRELATIONS:
        return CORRELATIONS[score](pairs)
    right = [is_right(*pair, e.score) for pair, e in zip(pairs, examples, strict=True)]
    return sum(right) / len(right)


def score_by(field: str, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """Return the score for each value of `field`: per `source` (data set) or per `adapter`."""
    parts: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        parts.setdefault(getattr(example, field), []).append(i)
    return {name: score_of([examples[i] for i in part], [answers[i] for i in part]) for name, part in parts.items()}


def batches_by_length(encoded: Sequence[Sized], size: int) -> list[list[int]]:
    """Return the example indices of each batch, sorted by length to save padding."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.no_grad()
def _by_example(
    model: nn.Module,
    held_out: HeldOut,
    call: Callable[[Rows, tqdm], list[T]],
    title: str,
    tokens: Callable[[Rows], int] | None = None,
) -> list[T]:
    """Return the results of `call` for each example, in order; switch to eval mode meanwhile."""
    # Rank k computes batches k, k + world_size, ... `call` advances the progress bar, by batches or by their tokens.
    processes, chunks = Processes(), batches_by_length(held_out.encoded, held_out.batch_size)
    own = [[held_out.encoded[i] for i in chunk] for chunk in chunks[processes.rank :: processes.world_size]]
    total, unit = (sum(map(tokens, own)), "token") if tokens else (len(own), "batch")
    bar = tqdm(total=total, desc=title, unit=unit, leave=False, disable=processes.rank > 0 or not title)
    with bar, modes_restored(model):
        model.eval()
        found = processes.gather_json([call(rows, bar) for rows in own])
    by_index: dict[int, T] = {}
    for k, indices in enumerate(chunks):  # batch k is the (k // world_size)-th result of rank k % world_size
        by_index |= zip(indices, found[k % processes.world_size][k // processes.world_size], strict=True)
    return [by_index[i] for i in range(len(by_index))]


def example_losses(model: nn.Module, batch: Batch) -> list[float]:
    """Return each example's mean loss in nats per token; remove `labels` from the batch."""
    # The model gets no labels, as its own loss would be a mean over all tokens of the batch.
    device = next(model.parameters()).device
    labels = batch.pop("labels").to(device)
    losses = token_losses(model(**to_device(batch, device)).logits, labels)
    return (losses.sum(1) / (labels[:, 1:] != IGNORED).sum(1)).tolist()


def token_limit(chunk: Sequence[Encoded], limit: int | None) -> int:
    """Return a batch's limit on new tokens: the one given, or its longest right answer plus a margin."""
    return limit or max(len(e.completion) for e in chunk) + ANSWER_MARGIN


@torch.no_grad()
def generate_answers(
    model: nn.Module, tokenizer: Tokenizer, chunk: Sequence[Encoded], bar: tqdm | None = None, *, limit: int | None
) -> list[str]:
    """Decode answers greedily; advance the bar with every token."""
    device = next(model.parameters()).device
    prompts = to_device(collate_prompts(chunk, tokenizer.pad_token_id, model), device)

    def advance(tokens: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Advance the bar: generate() calls stopping criteria once per token. This one never stops."""
        if bar is not None:
            bar.update(1)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    output = model.generate(  # type: ignore[operator]
        **prompts,
        max_new_tokens=token_limit(chunk, limit),
        **GREEDY,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends_of(tokenizer, model),
        stopping_criteria=[advance],
    )
    answers = output[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


class LanguageModeling:
    """Language modeling of completions and assistant turns, in the tokenizer's chat template if `template`."""

    task_type = "CAUSAL_LM"  # PEFT's

    def __init__(self, template: bool = False) -> None:
        self.template = template

    def load_model(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        """Load the model of a folder or hub id."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def encode(self, example: Example, tokenizer: Tokenizer, max_length: int, held_out: bool = False) -> Encoded:
        """See `tokenize.encode`."""
        return encode(example, tokenizer, max_length, held_out, self.template)

    def collator(self, tokenizer: Tokenizer, model: nn.Module) -> Collate:
        """Return a collator of encoded examples into a batch for `model(**batch).loss`."""
        return Collator(tokenizer.pad_token_id, model)

    def evaluate(self, model: nn.Module, tokenizer: Tokenizer, held_out: HeldOut, title: str) -> Evaluation:
        """Compute loss, score and answers, with batches split over ranks; `title` names the progress bars."""
        loss, limit = self.mean_loss(model, tokenizer, held_out, f"{title}: loss"), held_out.limit
        generate = partial(generate_answers, model, tokenizer, limit=limit)
        # Generation saves no activations, so its batches may be larger than those of the loss.
        longest_row = max(len(ids.prompt) + token_limit([ids], limit) for ids in held_out.encoded)
        wider = replace(held_out, batch_size=max(held_out.batch_size, TOKENS_PER_BATCH // longest_row))
        answers = _by_example(model, wider, generate, f"{title}: answers", partial(token_limit, limit=limit))
        return Evaluation(loss, score_of(held_out.examples, answers), answers)

    def mean_loss(self, model: nn.Module, tokenizer: Tokenizer, held_out: HeldOut, title: str = "") -> float:
        """Compute only the mean loss, without generation; show a progress bar if there is a title."""
        collate = self.collator(tokenizer, model)

        def batch_losses(rows: list[Encoded], bar: tqdm) -> list[float]:
            bar.update(1)
            return example_losses(model, collate(rows))

        losses = _by_example(model, held_out, batch_losses, title)
        return sum(losses) / len(losses)


class Classification:
    """Classification into `classes`, by index; without classes, regression to a number."""

    task_type = "SEQ_CLS"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    @classmethod
    def of(cls, train: Sequence[Example], held_out: Sequence[Example]) -> Classification:
        """Return the problem for these labels: values or classes."""
        if are_values([example.label for example in train]):
            for one in held_out:
                if number(one.completion) is None:
                    raise ValueError(f"the training labels are numbers, and a held-out one is {one.completion!r}")
                if one.score not in OF_VALUES:
                    raise ValueError(f"--score {one.score} counts equal labels, and these are values: take pearson")
            return cls(())
        classes = sorted({example.completion for example in train}, key=in_order)
        unknown = next((one.completion for one in held_out if one.completion not in classes), None)
        if unknown is not None:
            raise ValueError(f"the held-out label {unknown} is none of the training labels: {_shown(classes)}")
        if len(classes) < 2:
            raise ValueError(f"every training example has the label {classes[0]}: there is nothing to tell apart")
        asked = {example.score for example in held_out}
        of_values = sorted(asked & set(OF_VALUES))
        labels = f"and the labels are {_shown(classes)}: take label or matthews"
        if of_values and any(number(label) is None for label in classes):
            raise ValueError(f"--score {of_values[0]} takes numbers, {labels}")
        if len(classes) > 2 and "f1" in asked:
            raise ValueError(f"--score f1 is for two classes, {labels}")
        return cls(classes)

    def load_model(self, folder: str, dtype: torch.dtype) -> PreTrainedModel:
        """Load a model whose head has one output per class, or one output for values."""
        names = dict(enumerate(self.classes)) or {0: "value"}
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            problem_type="single_label_classification" if self.classes else "regression",
        )

        def to_fp32(module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
            return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in inputs)

        for name in missing_from_checkpoint(model):  # the head is trained in full; 16 bits would round its steps away
            model.get_submodule(name).float().register_forward_pre_hook(to_fp32)
        return model

    def encode(self, example: Example, tokenizer: Tokenizer, max_length: int, held_out: bool = False) -> EncodedText:
        """Tokenize a text or a pair, cut at `max_length` tokens, with its target."""
        inputs = tokenizer(example.prompt, example.pair or None, truncation=True, max_length=max_length)
        label = example.completion
        is_cut = len(inputs["input_ids"]) >= max_length
        return EncodedText(dict(inputs), self.classes.index(label) if self.classes else float(label), is_cut)

    def collator(self, tokenizer: Tokenizer, model: Any) -> Collate:
        """See `collate_texts`. Decoders read a row's last token, found by the padding token."""
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return partial(collate_texts, pad=tokenizer.pad_token_id)

    def evaluate(self, model: nn.Module, tokenizer: Tokenizer, held_out: HeldOut, title: str) -> Evaluation:
        """Mean loss (cross-entropy in nats, or squared error), score, and predicted labels."""
        device, collate = next(model.parameters()).device, self.collator(tokenizer, model)

        def predict(rows: list[EncodedText], bar: tqdm) -> list[tuple[float, str]]:
            """Return the loss and predicted label of each example of a batch; advance the bar."""
            batch = to_device(collate(rows), device)
            targets = batch.pop("labels")
            bar.update(1)
            logits = model(**batch).logits.float()  # [batch, classes], or [batch, 1] of values
            if self.classes:
                losses = nn.functional.cross_entropy(logits, targets, reduction="none")
                answers = [self.classes[i] for i in logits.argmax(1).tolist()]
            else:
                losses, answers = (logits[:, 0] - targets).square(), [str(value) for value in logits[:, 0].tolist()]
            return list(zip(losses.tolist(), answers, strict=True))

        pairs = _by_example(model, held_out, predict, title)
        answers = [answer for _, answer in pairs]
        return Evaluation(sum(loss for loss, _ in pairs) / len(pairs), score_of(held_out.examples, answers), answers)

    def mean_loss(self, model: nn.Module, tokenizer: Tokenizer, held_out: HeldOut) -> float:
        """Compute only the mean loss."""
        return self.evaluate(model, tokenizer, held_out, "").loss


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")


Problem = LanguageModeling | Classification


def problem_of(train: Sequence[Example], held_out: Sequence[Example], settings: Settings) -> Problem:
    """Return the kind of run for these examples; raise a ValueError for unsuitable settings."""
    labeled = sum(example.label is not None for example in [*train, *held_out])
    if labeled not in (0, len(train) + len(held_out)):
        some = f"{labeled} of {len(train) + len(held_out)} examples have a label"
        raise ValueError(f"{some}: give all of them one (text and label), or none (prompt and completion)")
    wrong = sorted({e.score for e in held_out if (e.score in LABEL_SCORES) != bool(labeled)})
    if wrong:
        kind, fitting = ("labels", LABEL_SCORES) if labeled else ("texts", [s for s in SCORES if s not in LABEL_SCORES])
        raise ValueError(f"--score {wrong[0]} is not for {kind}, which the examples have: take {', '.join(fitting)}")
    if not labeled:
        return LanguageModeling(settings.template == "auto")
    if settings.adapter_column is not None:
        raise ValueError("--adapter-column trains language models: a classifier has one head for all adapters")
    if settings.rl is not None:
        raise ValueError("--rl trains language models by what they answer, and the examples have labels: leave it out")
    if settings.packing:
        raise ValueError("--packing puts several examples into a row, and a row has one label: leave it out")
    # A class may occur only in randomly held-out examples, but not only in --eval-data.
    return Classification.of([*train, *held_out] if settings.eval_data is None else train, held_out)
