"""Hashes of what an initialization depends on: equal for the same code and values, in any process, and else different."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Batch, make
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


def test_a_hash_is_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets among a function's constants have no order of their own: forty names agree in theirs by no accident."""
    names = ", ".join(repr(f"name {i}") for i in range(40))
    (tmp_path / "a_loss.py").write_text(f"def loss(model, batch):\n    return batch in {{{names}}}\n")
    code = "import a_loss; from lorasb.init.provenance import function_hash; print(function_hash(a_loss.loss))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert done.stdout.strip() == function_hash(importlib.import_module("a_loss").loss)


class Loss:
    """A loss with a call of its own."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The model's own."""
        return model(**batch).loss


def loss_of(model: nn.Module, batch: Batch, **options: object) -> torch.Tensor:
    return model(**batch)["loss"]
