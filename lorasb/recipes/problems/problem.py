"""The kinds of a run: language modeling, or classification where examples have labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from ..examples.tasks import Example
from ..examples.tokenization import Collator, encode
from ..settings import Settings
from .classification import Classification
from .evaluation import Evaluation, HeldOut, evaluate, mean_loss
from .scoring import LABEL_SCORES, SCORES


class Problem(Protocol):
    """What a run needs to know of its examples: which model, how they become batches, how answers are judged."""

    task_type: str  # PEFT's

    takes_loss_arguments: bool | None  # of the model's forward, for Trainer; None if Trainer's own look is right

    def load_model(self, folder: str, dtype: Any) -> Any:
        """The model of a folder or hub id."""

    def heads(self, model: Any) -> list[str]:
        """Modules of the model that the checkpoint lacks: trained whole and saved, in fp32, never quantized."""

    def encode(self, example: Example, tokenizer: Any, max_length: int, held_out: bool = False) -> Any:
        """An example's tokens; `len` of it counts them."""

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], dict[str, Any]]:
        """From encoded examples to a batch whose loss is `model(**batch).loss`; `model` has no PEFT wrapper."""

    def evaluate(self, model: nn.Module, tokenizer: Any, held_out: HeldOut, title: str) -> Evaluation:
        """Loss, score and answers, split over ranks; `title` names the progress bars."""

    def mean_loss(self, model: nn.Module, tokenizer: Any, held_out: HeldOut) -> float:
        """The loss alone."""


class LanguageModeling:
    """Completions of prompts, and the assistant's turns of chats.

    Args:
        template: put prompts into the tokenizer's chat template, where it has one.
    """

    def __init__(self, template: bool = False) -> None:
        self.template = template

    task_type = "CAUSAL_LM"
    takes_loss_arguments: bool | None = None

    def heads(self, model: Any) -> list[str]:
        """None: the output embeddings come with the checkpoint."""
        return []

    def load_model(self, folder: str, dtype: Any) -> Any:
        """A causal language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def encode(self, example: Example, tokenizer: Any, max_length: int, held_out: bool = False) -> Any:
        """See `tokenization.encode`."""
        return encode(example, tokenizer, max_length, held_out, self.template)

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


def problem_of(train: Sequence[Example], held_out: Sequence[Example], settings: Settings) -> Problem:
    """The kind of run that examples ask for.

    Raises:
        ValueError: labels in a part of the examples only, labels that cannot be learned, scores that do not go with
            them, or packing or several adapters for examples with labels.
    """
    labeled = sum(example.label is not None for example in [*train, *held_out])
    if labeled not in (0, len(train) + len(held_out)):
        raise ValueError(
            f"{labeled} of {len(train) + len(held_out)} examples have a label: give all of them one (text and label), "
            "or none (prompt and completion)"
        )
    wrong = sorted({e.score for e in held_out if (e.score in LABEL_SCORES) != bool(labeled)})
    if wrong:
        kind, fitting = ("labels", LABEL_SCORES) if labeled else ("texts", [s for s in SCORES if s not in LABEL_SCORES])
        raise ValueError(f"--score {wrong[0]} does not judge {kind}, which the examples have: {', '.join(fitting)} do")
    if not labeled:
        return LanguageModeling(settings.template == "auto")
    if settings.adapter_column is not None:
        raise ValueError("--adapter-column trains language models: a classifier's head is one for all adapters")
    if settings.rl is not None:
        raise ValueError("--rl trains language models by what they answer, and the examples have labels: leave it out")
    if settings.packing:
        raise ValueError("--packing puts several examples into a row, and a row has one label: leave it out")
    # A class whose only examples were drawn to be held out is no mistake; one of another file's is.
    return Classification.of([*train, *held_out] if settings.eval_data is None else train, held_out)
