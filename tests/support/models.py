"""Tiny models of real families, and batches for them."""

from __future__ import annotations

import environment  # noqa: F401  before anything reads it
import torch
import transformers
from families import FAMILIES, SIZES, llama
from torch import Tensor, nn

import lorasb

transformers.utils.logging.disable_progress_bar()

Batch = dict[str, Tensor]
__all__ = ["FAMILIES", "SIZES", "llama"]


def text(rows: int, tokens: int, seed: int) -> Batch:
    """Causal batch without padding; every second label of the first half is ignored."""
    ids = torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : tokens // 2 : 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def classes(rows: int, tokens: int, seed: int) -> Batch:
    """Classification batch."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (rows, tokens), generator=g)
    labels = torch.randint(0, 3, (rows,), generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    return FAMILIES[family]().to(dtype).eval()


def pictures(rows: int, _: int, seed: int) -> Batch:
    """Image classification batch."""
    g = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=g),
        "labels": torch.randint(0, 3, (rows,), generator=g),
    }


BATCHES = {"roberta": classes, "bert": classes, "deberta": classes, "vit": pictures}


def batches_for(family: str, count: int = 3, rows: int = 2, tokens: int = 12) -> list[Batch]:
    """Batches that fit a family."""
    return [BATCHES.get(family, text)(rows, tokens, seed) for seed in range(count)]


class Rows(list[Batch]):
    """Eight rows of a Llama's batch."""

    def __init__(self) -> None:
        batch = batches_for("llama", count=1, rows=8)[0]
        super().__init__({key: value[i] for key, value in batch.items()} for i in range(8))


def patched(family: str = "llama", r: int = 4, dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    """A tiny model with an initialized adapter whose effect is plain to see."""
    model = lorasb.patch(make(family, dtype=dtype), r=r, **fields)
    lorasb.initialize(model, batches_for(family), lr=2e-2, progress=False)
    return model


def started(family: str = "llama", r: int = 4, **options: object) -> tuple[nn.Module, lorasb.InitReport]:
    """A new model that is initialized with these options, and the report."""
    model = lorasb.patch(make(family), r=r)
    return model, lorasb.initialize(model, **{"batches": batches_for(family), "lr": 1e-3, "progress": False} | options)


def logits(model: nn.Module, family: str = "llama") -> Tensor:
    """The model's answer to a fixed batch."""
    batch = batches_for(family, count=1)[0]
    with torch.no_grad():
        return model(**batch).logits
