"""What identifies an initialization in a cache: hashes of weights, names of losses."""

from __future__ import annotations

import functools

import pytest
import torch
from models import Batch, make
from torch import nn

import lorasb
from lorasb.init.provenance import cache_key, weights_hash
from lorasb.init.task import InitOptions
from lorasb.layers.lookup import adapted_layers


def test_weights_are_told_apart() -> None:
    assert weights_hash(make("llama")) == weights_hash(make("llama")) != weights_hash(make("llama", seed=1))
    assert weights_hash(make("llama")) != weights_hash(make("llama", dtype=torch.bfloat16))


def loss_of(model: nn.Module, batch: Batch, **options: object) -> torch.Tensor:
    return model(**batch)["loss"]


class Loss:
    """A loss with a call of its own."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The model's own."""
        return model(**batch).loss


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [(None, None), (loss_of, "loss_of"), (functools.partial(loss_of, share=1), "loss_of"), (Loss(), "Loss")],
)
def test_a_loss_counts_by_its_name(loss_fn: object, name: str | None) -> None:
    model = lorasb.patch(make("llama"), r=4)
    options = InitOptions(loss_fn=loss_fn)  # type: ignore[arg-type]
    assert cache_key(model, adapted_layers(model)[1], options, 3, "0")["loss_fn"] == name
