"""`lorasb.quantize`: what it refuses and what it leaves alone."""

from __future__ import annotations

import pytest
from models import llama
from torch import nn

import lorasb
from lorasb.layers.linear4bit import Linear4bit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "nf3"}, "nf4, fp4"), ({"blocksize": 48}, "blocksize"), ({"exclude": ["0"]}, "no linear")],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: dict, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=message):
        lorasb.quantize(model, **arguments)
    assert type(model[0]) is nn.Linear


def test_heads_are_left_and_a_weight_that_is_not_finite_changes_nothing() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        lorasb.quantize(model)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())
    model = lorasb.quantize(llama(), "fp4", blocksize=32)
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14
