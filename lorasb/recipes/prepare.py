"""A run's model, tokenizer and encoded examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..utils.precision import Precision, resolve
from .bundled_model import resolve_model
from .data import load_examples
from .evaluation import Evaluation, evaluate, mean_loss
from .settings import Settings
from .tasks import Example
from .tokenization import Encoded, encode, with_progress


@dataclass
class Run:
    """A run in progress."""

    settings: Settings
    precision: Precision
    tokenizer: Any
    model: Any
    train: list[Example]
    held_out: list[Example]
    train_ids: list[Encoded]
    held_out_ids: list[Encoded]
    rows: Sequence[Any]  # what training goes through: the encoded examples, or packs of them

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, math.ceil(-(-len(self.rows) // self.settings.batch_size) * self.settings.epochs))

    @property
    def warmup_steps(self) -> int:
        """Those of them that warm up."""
        return round(self.settings.warmup * self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of the training examples, each as often as it is seen."""
        return round(sum(map(len, self.train_ids)) * self.settings.epochs)

    def evaluate(self, title: str) -> Evaluation:
        """Held-out loss, accuracy and answers of the model as it is now."""
        batch = 2 * self.settings.batch_size
        return evaluate(self.model, self.tokenizer, self.held_out, self.held_out_ids, batch, title)

    def held_out_loss(self) -> float:
        """The held-out loss alone."""
        return mean_loss(self.model, self.tokenizer.pad_token_id, self.held_out_ids, 2 * self.settings.batch_size)


def device() -> str:
    """Where a run computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(settings: Settings, examples: tuple[list[Example], list[Example]] | None = None) -> Run:
    """Load the model, make or read the examples where they are not given, and tokenize them.

    Raises:
        ValueError: bad settings or data, a model that cannot be loaded, a dtype that the device has not got.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(settings.seed)
    precision = resolve(settings.dtype, device())
    train_examples, held_out = examples or load_examples(settings)
    folder = resolve_model(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=precision.dtype)
    except OSError as error:
        raise ValueError(f"cannot load --model {settings.model!r}, expected a folder or hub id: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device())
    if settings.bits == 4:
        import lorasb

        lorasb.quantize(model, "nf4", nested=True)
    contiguous_head(model)
    one = partial(encode, tokenizer=tokenizer, max_length=settings.max_length)
    train_ids, held_out_ids = (with_progress(one, part, "tokens") for part in (train_examples, held_out))
    rows: Sequence[Any] = train_ids
    if settings.packing:
        from .packing import check_model, pack

        check_model(model)
        rows = pack(train_ids, settings.max_length)
    return Run(settings, precision, tokenizer, model, train_examples, held_out, train_ids, held_out_ids, rows)


def contiguous_head(model: nn.Module) -> None:
    """Hand the head a contiguous slice of hidden states.

    With `logits_to_keep` the slice is a strided view, for which torch multiplies sample by sample on CPUs and copies
    the head's weight for each: 0.7 s of a 1.4 s step of SmolLM2.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
