"""The kinds of a run: language modeling, or classification where examples have labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from ..examples.tasks import Example
from ..examples.tokenization import Collator, encode
from .classification import Classification
from .evaluation import Evaluation, HeldOut, evaluate, mean_loss
from .scoring import LABEL_SCORES


class Problem(Protocol):
    """What a run needs to know of its examples: which model, how they become batches, how answers are judged."""

    task_type: str  # PEFT's

    def load_model(self, folder: str, dtype: Any) -> Any:
        """The model of a folder or hub id."""

    def encode(self, example: Example, tokenizer: Any, max_length: int) -> Any:
        """An example's tokens; `len` of it counts them."""

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], dict[str, Any]]:
        """From encoded examples to a batch whose loss is `model(**batch).loss`; `model` has no PEFT wrapper."""

    def evaluate(self, model: nn.Module, tokenizer: Any, held_out: HeldOut, title: str) -> Evaluation:
        """Loss, score and answers, split over ranks; `title` names the progress bars."""

    def mean_loss(self, model: nn.Module, tokenizer: Any, held_out: HeldOut) -> float:
        """The loss alone."""


class LanguageModeling:
    """Completions of prompts, and the assistant's turns of chats."""

    task_type = "CAUSAL_LM"

    def load_model(self, folder: str, dtype: Any) -> Any:
        """A causal language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def encode(self, example: Example, tokenizer: Any, max_length: int) -> Any:
        """See `tokenization.encode`."""
        return encode(example, tokenizer, max_length)

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], dict[str, Any]]:
        """See `tokenization.Collator`."""
        return Collator(tokenizer.pad_token_id, model)

    def evaluate(self, model: nn.Module, tokenizer: Any, held_out: HeldOut, title: str) -> Evaluation:
        """See `evaluation.evaluate`."""
        examples, encoded, batch_size, limit = held_out.examples, held_out.encoded, held_out.batch_size, held_out.limit
        return evaluate(model, tokenizer, examples, encoded, batch_size, title, limit)

    def mean_loss(self, model: nn.Module, tokenizer: Any, held_out: HeldOut) -> float:
        """See `evaluation.mean_loss`."""
        return mean_loss(model, tokenizer.pad_token_id, held_out.encoded, held_out.batch_size)


def problem_of(train: Sequence[Example], held_out: Sequence[Example], packing: bool) -> Problem:
    """The kind of run that examples ask for.

    Raises:
        ValueError: labels in a part of the examples only, labels that cannot be learned, scores that need labels, or
            packing of examples with labels.
    """
    labeled = sum(example.label is not None for example in [*train, *held_out])
    if not labeled:
        scores = {example.score for example in held_out} & set(LABEL_SCORES)
        if scores:
            raise ValueError(f"--score {scores.pop()} judges labels, and these examples have none: text and label")
        return LanguageModeling()
    if labeled < len(train) + len(held_out):
        raise ValueError(
            f"{labeled} of {len(train) + len(held_out)} examples have a label: give all of them one (text and label), "
            "or none (prompt and completion)"
        )
    if packing:
        raise ValueError("--packing puts several examples into a row, and a row has one label: leave it out")
    return Classification.of(train, held_out)
