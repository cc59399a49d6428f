"""Loads a run's model, tokenizer and examples, and tokenizes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from ..init.schedule import warmup_steps
from ..layers.quantize import LEFT_OUT
from ..tuner.config import ALL_LINEAR
from ..tuner.targets import refuse_unknown_names
from ..utils.precision import Precision, resolve
from .bundled_model import resolve_model
from .examples.batch_order import ByLength
from .examples.data import load_examples
from .examples.packing import PackCollator, row_length
from .examples.tasks import Example
from .examples.tokenization import Collator, with_progress
from .problems.evaluation import Evaluation, HeldOut
from .problems.problem import Problem, problem_of
from .problems.scoring import REASONED
from .setting_rules import target_names
from .settings import ENOUGH_STEPS, MOST_EPOCHS, Settings

REASONING_TOKENS = 512  # of answers whose end is judged, which may be longer than the right one


@dataclass
class Run:
    """A prepared run: settings, model, tokenizer and encoded examples."""

    settings: Settings
    precision: Precision
    problem: Problem
    tokenizer: Any
    model: Any
    train: list[Example]
    held_out: list[Example]
    train_ids: list[Any]
    held_out_ids: list[Any]
    rows: Sequence[Any]  # training rows: encoded examples, or packs of them
    lr: float  # peak learning rate: of the settings, or found by trials

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return max(1, math.ceil(self._steps_per_epoch * self.epochs))  # epochs may be a fraction

    @property
    def epochs(self) -> float:
        """Passes over the training rows: those of the settings, or as many as make enough steps."""
        enough = math.ceil(ENOUGH_STEPS / max(1, self._steps_per_epoch))
        return self.settings.epochs or float(min(enough, MOST_EPOCHS))

    @property
    def _steps_per_epoch(self) -> int:
        if self.settings.rl is not None:  # TRL leaves out the prompts that are too few for a step
            return len(self.rows) // self.settings.prompts_a_step
        return -(-len(self.rows) // self.settings.batch_size)  # the last step may be smaller than the others

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps."""
        return warmup_steps(self.settings.warmup, self.steps)

    @property
    def tokens(self) -> int:
        """Number of training tokens over all epochs, without padding."""
        return round(sum(map(len, self.train_ids)) * self.epochs)

    @cached_property  # asked for often, and one pass over all examples
    def adapters(self) -> list[str]:
        """Names of the adapters that have examples of their own; none without `--adapter-column`."""
        return sorted({example.adapter for example in [*self.train, *self.held_out]} - {""})

    def evaluate(self, title: str) -> Evaluation:
        """Held-out loss, accuracy and answers of the current model."""
        return self.problem.evaluate(self.model, self.tokenizer, self._held_out(), title)

    def held_out_loss(self) -> float:
        """The held-out loss alone."""
        return self.problem.mean_loss(self.model, self.tokenizer, self._held_out())

    def order(self) -> ByLength:
        """The order of the training rows."""
        return ByLength([row_length(row) for row in self.rows], self.settings.batch_size, self.settings.seed)

    def collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """From training rows to a batch; with adapters of their own, the rows' names are in it."""
        if self.adapters:
            return Collator(self.tokenizer.pad_token_id, self.model.get_base_model(), by_adapter=True)
        return self.unnamed_collator()

    def unnamed_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """From training rows to a batch for one adapter."""
        if self.settings.packing:
            return PackCollator(self.tokenizer.pad_token_id)
        return self.problem.collator(self.tokenizer, self.model.get_base_model())

    def _held_out(self) -> HeldOut:
        settings = self.settings
        # twice what is computed at once in training: no activations are kept for backward
        batch = max(1, 2 * settings.batch_size // settings.gradient_accumulation)
        reasoned = any(example.score in REASONED for example in self.held_out)
        limit = settings.max_new_tokens or (REASONING_TOKENS if reasoned else None)
        return HeldOut(self.held_out, self.held_out_ids, batch, limit)


def device() -> str:
    """The device type of a run: "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(settings: Settings, examples: tuple[list[Example], list[Example]] | None = None) -> Run:
    """Load the model, generate or read the examples unless they are given, and tokenize them.

    Raises:
        ValueError: bad settings or data, a model that cannot be loaded, or a dtype that the device lacks.
    """
    from transformers import set_seed

    set_seed(settings.seed)  # LoRA's random A, dropout, and weights that transformers initializes
    precision = resolve(settings.dtype, device())
    train_examples, held_out = examples or load_examples(settings)
    _check_prompts(settings, len(train_examples))
    problem = problem_of(train_examples, held_out, settings)
    tokenizer, model = load_model(settings, problem, precision.dtype)
    encode_one = partial(problem.encode, tokenizer=tokenizer, max_length=settings.max_length)
    train_ids = with_progress(encode_one, train_examples, "tokens")
    held_out_ids = with_progress(partial(encode_one, held_out=True), held_out, "tokens")
    rows = _packed(model, train_ids, settings.max_length) if settings.packing else train_ids
    encoded = train_examples, held_out, train_ids, held_out_ids, rows
    return Run(settings, precision, problem, tokenizer, model, *encoded, settings.lr)


def _check_prompts(settings: Settings, count: int) -> None:
    """Raise a ValueError for fewer prompts than a step of `--rl` takes, of which TRL would train none."""
    if settings.rl is not None and count < settings.prompts_a_step:
        raise ValueError(
            f"--rl takes {settings.prompts_a_step} prompts a step (--batch-size over --generations), and there are "
            f"{count} to train on: take --batch-size {count * settings.generations} or lower"
        )


def load_model(settings: Settings, problem: Problem, dtype: torch.dtype) -> tuple[Any, Any]:
    """The tokenizer, and the model on its device, quantized if asked for."""
    from transformers import AutoTokenizer

    folder = resolve_model(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = problem.load_model(folder, dtype)
    except OSError as error:
        raise ValueError(f"cannot load --model {settings.model!r}, expected a folder or hub id: {error}") from None
    # Llama's tokenizer has no padding token; padding is masked, so any token serves.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.target_modules is not None and settings.target_modules != ALL_LINEAR:
        refuse_unknown_names(model, target_names(settings.target_modules) or ())
    model.to(device())
    if settings.bits == 4:
        import lorasb

        heads = [n for head in problem.heads(model) for n, _ in model.get_submodule(head).named_modules(prefix=head)]
        lorasb.quantize(model, "nf4", nested=True, exclude=[*LEFT_OUT, *heads])
    contiguous_head(model)
    return tokenizer, model


def _packed(model: nn.Module, encoded: list[Any], length: int) -> Sequence[Any]:
    """Rows of several examples each, once the model is known to keep them apart."""
    from .examples.packing import check_model, pack

    check_model(model)
    return pack(encoded, length)


def contiguous_head(model: nn.Module) -> None:
    """Register a pre-hook that makes the input of the output head contiguous.

    With `logits_to_keep` the input is a strided view. On CPUs torch multiplies such a view sample by sample and copies
    the head's weight each time: 0.7 s of a 1.4 s step of SmolLM2.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))


def checkpoint_activations(base: Any) -> None:
    """Enable activation checkpointing, by the method's name in the installed transformers."""
    # The reentrant variant needs an input that requires a gradient, and the embeddings of a frozen base do not.
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
