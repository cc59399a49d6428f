"""Merging back into 4 bits: the error of each layer is told."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import llama
from quantized_models import batches, initialized

import lorasb
from lorasb.functional import dequantize
from lorasb.layers.linear4bit import Linear4bit


@pytest.mark.parametrize("kind", ["own nested", "nf4"])
def test_merging_back_into_4_bits_tells_the_error(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = initialized(kind).eval()
    dense = copy.deepcopy(model).merge_and_unload()
    with caplog.at_level(logging.WARNING, logger="lorasb"):
        packed = model.merge_and_unload(requantize=True)
    assert "requantized 14 layers" in caplog.text
    for name, error in packed.requantization_errors.items():
        layer, wide = packed.get_submodule(name), dense.get_submodule(name).weight
        assert isinstance(layer, Linear4bit)
        assert layer.quant_state.nested == ("nested" in kind)
        found = (dequantize(layer.quantized(), torch.float32) - wide).norm() / wide.norm()
        assert error == pytest.approx(float(found), rel=1e-5)
        assert 0.01 < error < 0.2
    packed(**batches()[0])


def test_requantizing_needs_something_to_requantize() -> None:
    model = lorasb.patch(llama(), r=4)
    lorasb.initialize(model, batches(), lr=1e-2, progress=False)
    with pytest.raises(ValueError, match="has none"):
        model.merge_and_unload(requantize=True)
