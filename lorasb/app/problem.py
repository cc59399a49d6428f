"""The kinds of a run: language modeling, or classification where examples have labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..init.task import to_device
from ..tuner.fresh_heads import missing_from_checkpoint
from .evaluation import Evaluation, HeldOut, batches_by_length, evaluate, map_over_ranks, mean_loss, score_of
from .scoring import LABEL_SCORES, OF_VALUES, SCORES
from .settings import Settings
from .tasks import Example
from .tokenize import Collator, encode


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text or a pair of texts, and the class's index or the value to be learned."""

    inputs: dict[str, list[int]]
    target: int | float

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


class TextCollator:
    """Pads on the right and adds `labels`."""

    def __init__(self, tokenizer: Any) -> None:
        # other inputs (attention_mask, token_type_ids) are padded by zeros
        self.pads = {"input_ids": tokenizer.pad_token_id}

    def __call__(self, examples: list[EncodedText]) -> dict[str, Any]:
        width = max(map(len, examples))
        batch: dict[str, Any] = {
            name: torch.tensor([e.inputs[name] + [self.pads.get(name, 0)] * (width - len(e)) for e in examples])
            for name in examples[0].inputs
        }
        return batch | {"labels": torch.tensor([e.target for e in examples])}


class Classification:
    """One of `classes`, or a number where there are none.

    Attributes:
        classes: the labels in order; their indices are what the model learns. Empty for regression.
    """

    task_type = "SEQ_CLS"
    # Its forward takes **kwargs and passes them to no loss, which is a mean over a batch: Trainer has to divide it.
    takes_loss_arguments: bool | None = False

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.index = {label: i for i, label in enumerate(self.classes)}

    @classmethod
    def of(cls, train: Sequence[Example], held_out: Sequence[Example]) -> Classification:
        """The problem that labels make: numbers of which any has a point (2.5) are values, others are classes."""
        labels = [example.label for example in train if example.label is not None]
        if all(isinstance(label, int | float) for label in labels) and any(isinstance(v, float) for v in labels):
            return cls._of_values(held_out)
        classes = sorted({str(label) for label in labels}, key=_numbers_first)
        for example in held_out:
            if example.completion not in classes:
                raise ValueError(
                    f"the held-out label {example.completion} is none of the training labels: {_shown(classes)}"
                )
        if len(classes) < 2:
            raise ValueError(f"every training example has the label {classes[0]}: there is nothing to tell apart")
        asked = {example.score for example in held_out}
        if any(_number(label) is None for label in classes) and asked & set(OF_VALUES):
            score = sorted(asked & set(OF_VALUES))[0]
            raise ValueError(f"--score {score} takes numbers, and the labels are {_shown(classes)}: label or matthews")
        if len(classes) > 2 and "f1" in asked:
            raise ValueError(f"--score f1 is of two classes, and the labels are {_shown(classes)}: label or matthews")
        return cls(classes)

    @classmethod
    def _of_values(cls, held_out: Sequence[Example]) -> Classification:
        for example in held_out:
            if _number(example.completion) is None:
                raise ValueError(f"the training labels are numbers, and a held-out one is {example.completion!r}")
            if example.score not in OF_VALUES:
                raise ValueError(f"--score {example.score} counts equal labels, and these are values: --score pearson")
        return cls(())

    def load_model(self, folder: str, dtype: Any) -> Any:
        """A model with a head of as many outputs as there are classes, or one."""
        from transformers import AutoModelForSequenceClassification

        names = dict(enumerate(self.classes)) or {0: "value"}
        kind = "single_label_classification" if self.classes else "regression"
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            problem_type=kind,
        )
        for name in self.heads(model):  # a step of training is lost on weights of 16 bits
            model.get_submodule(name).float().register_forward_pre_hook(_to_fp32)
        return model

    def heads(self, model: Any) -> list[str]:
        """The head, and a pooler that the checkpoint lacks."""
        return missing_from_checkpoint(model)

    def encode(self, example: Example, tokenizer: Any, max_length: int, held_out: bool = False) -> EncodedText:
        """A text or a pair, cut at `max_length` tokens, and its target."""
        inputs = tokenizer(example.prompt, example.pair or None, truncation=True, max_length=max_length)
        label = example.completion
        return EncodedText(dict(inputs), self.index[label] if self.classes else float(label))

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], dict[str, Any]]:
        """See `TextCollator`. Decoders read a row's last token, which they find by the padding token."""
        config: Any = model.config
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return TextCollator(tokenizer)

    def evaluate(self, model: nn.Module, tokenizer: Any, held_out: HeldOut, title: str) -> Evaluation:
        """Mean loss (cross-entropy in nats, or squared error), score, and predicted labels."""
        losses, answers = self._predict(model, tokenizer, held_out, title)
        return Evaluation(sum(losses) / len(losses), score_of(held_out.examples, answers), tuple(answers))

    def mean_loss(self, model: nn.Module, tokenizer: Any, held_out: HeldOut) -> float:
        """The mean loss alone."""
        losses, _ = self._predict(model, tokenizer, held_out, "")
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _predict(
        self, model: nn.Module, tokenizer: Any, held_out: HeldOut, title: str
    ) -> tuple[list[float], list[str]]:
        """Loss and predicted label of each example, in order; restores the model's train or eval mode."""
        encoded = held_out.encoded
        mode, device = model.training, next(model.parameters()).device
        model.eval()
        collate = self.collator(tokenizer, getattr(model, "get_base_model", lambda: model)())
        chunks = batches_by_length(encoded, held_out.batch_size)

        def predict(indices: list[int], bar: Any) -> list[tuple[float, str]]:
            """Loss and answer of each example of a batch; advances the bar."""
            batch = to_device(collate([encoded[i] for i in indices]), device)
            targets = batch.pop("labels")
            bar.update(1)
            return self._judge(model(**batch).logits.float(), targets)

        results = map_over_ranks(chunks, predict, [1] * len(chunks), title, "batch")
        model.train(mode)
        by_index = {i: one for indices, ones in results for i, one in zip(indices, ones, strict=True)}
        pairs = [by_index[i] for i in range(len(encoded))]
        return [loss for loss, _ in pairs], [answer for _, answer in pairs]

    def _judge(self, logits: torch.Tensor, targets: torch.Tensor) -> list[tuple[float, str]]:
        """Loss and answer of each row of logits [batch, classes], or [batch, 1]."""
        if not self.classes:
            values = logits[:, 0]
            return list(zip((values - targets).square().tolist(), map(str, values.tolist()), strict=True))
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        return list(zip(losses, (self.classes[i] for i in logits.argmax(1).tolist()), strict=True))


def _to_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in inputs)


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _numbers_first(label: str) -> tuple[bool, float, str]:
    """The order of classes: numbers by value, then texts."""
    value = _number(label)
    return value is None, value or 0.0, label


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")


class Problem(Protocol):
    """Kind of a run's examples: which model they need, how they become batches, how answers are scored."""

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
    """The kind of run that examples ask for."""
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
