"""Former names work, and say what to write instead."""

from __future__ import annotations

import pytest
from torch import nn

import lorasb
from lorasb import functional


@pytest.mark.parametrize(("old", "new"), [("quantised_linear", "quantized_linear"), ("dequantize_nf4", "dequantize")])
def test_a_function(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"functional\.{old} is deprecated.*: use lorasb\.functional\.{new}"):
        assert getattr(functional, old) is getattr(functional, new)


def test_a_method() -> None:
    layer = lorasb.quantize(nn.Sequential(nn.Linear(64, 32)))[0]
    with pytest.warns(DeprecationWarning, match=r"Linear4bit\.quantised is deprecated.*: use Linear4bit\.quantized"):
        assert layer.quantised() is layer.quantized()
    adapted = lorasb.LoRASBLinear(nn.Linear(64, 32), "default", 4)
    with pytest.warns(DeprecationWarning, match=r"LoRASBLinear\.quantised is deprecated"):
        assert adapted.quantised() is None


def test_a_name_that_never_was() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'dequantise'"):
        functional.dequantise  # noqa: B018
