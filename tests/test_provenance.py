"""Hashes of what an initialisation depends on: equal for the same code and values, in any process, and else different."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import torch
from conftest import Batch, make
from torch import nn

from lorasb.init.provenance import function_hash, weights_hash


def test_weights_are_told_apart() -> None:
    assert weights_hash(make("llama")) == weights_hash(make("llama")) != weights_hash(make("llama", seed=1))
    assert weights_hash(make("llama")) != weights_hash(make("llama", dtype=torch.bfloat16))


def test_losses_are_told_apart_by_what_they_compute() -> None:
    def scaled(share: float) -> object:
        return lambda model, batch: share * model(**batch).loss

    assert function_hash(scaled(1.0)) == function_hash(scaled(1.0)) != function_hash(scaled(0.5))
    assert function_hash(functools.partial(loss_of, share=1)) != function_hash(functools.partial(loss_of, share=2))
    assert function_hash(Loss()).startswith("Loss ")
    assert function_hash(Loss(1.0)) != function_hash(Loss(2.0))
    assert function_hash(nn.L1Loss()) != function_hash(nn.L1Loss(reduction="sum")) != function_hash(nn.MSELoss())
    by_table = [functools.partial(loss_of, table={"beta": beta}) for beta in (0.1, 0.5)]
    assert function_hash(by_table[0]) != function_hash(by_table[1])
    assert function_hash(with_default(1)) != function_hash(with_default(2))


def with_default(value: int) -> object:
    def loss(model: nn.Module, batch: Batch, *, beta: int = value) -> torch.Tensor:
        return model(**batch).loss * beta

    return loss


def test_a_hash_is_the_same_in_another_process() -> None:
    """Sets among a function's constants have no order of their own."""
    code = "from lorasb.init.provenance import function_hash as f; print(f(lambda m, b: b in {'a', 'b', 'c'}))"
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


class Loss:
    """A loss with a call of its own."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The model's own."""
        return model(**batch).loss


def loss_of(model: nn.Module, batch: Batch, **options: object) -> torch.Tensor:
    return model(**batch)["loss"]
