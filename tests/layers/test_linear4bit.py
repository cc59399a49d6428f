"""Our layer in 4 bits: its dense twin's answer, and files that bitsandbytes and it exchange."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_models import bnb, to_bitsandbytes
from tolerances import EXACT, EXPORT, check
from torch import nn

import lorasb
from lorasb.functional import dequantize


def test_files_of_ours_load_into_bitsandbytes_and_theirs_into_ours() -> None:
    for nested in (False, True):
        dense = nn.Linear(128, 64)
        ours = lorasb.quantize(nn.Sequential(copy.deepcopy(dense)), nested=nested)[0]
        written = ours.state_dict()
        theirs = bnb.nn.Params4bit.from_prequantized(
            written["weight"],
            {k.removeprefix("weight."): v for k, v in written.items() if k.startswith("weight.")},
            device="cpu",
        )
        assert torch.equal(
            bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), dequantize(ours.quantized())
        )
        other = lorasb.quantize(nn.Sequential(nn.Linear(128, 64)), nested=nested)[0]
        other.load_state_dict(to_bitsandbytes(dense, "nf4 nested" if nested else "nf4").state_dict())
        x = torch.randn(3, 128)
        check(other(x), ours(x), EXACT)
        damaged = {k: v for k, v in written.items() if not k.endswith("quant_map")}
        with pytest.raises(RuntimeError, match="quant_map"):
            other.load_state_dict(damaged)
        written["weight.absmax"] = written["weight.absmax"][:-1]
        with pytest.raises(RuntimeError, match="scales"):
            other.load_state_dict(written)


def test_a_move_that_fails_keeps_the_packed_weight() -> None:
    layer = lorasb.quantize(nn.Sequential(nn.Linear(64, 32)), storage=torch.bfloat16)[0]
    packed = layer.weight

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        layer._apply(full)
    assert layer.weight is packed


def test_a_linear_of_4_bits_is_its_dense_twin() -> None:
    layer = lorasb.quantize(nn.Sequential(nn.Linear(96, 40)))[0]
    dense = dequantize(layer.quantized())
    x = torch.randn(2, 5, 96, requires_grad=True)
    want = torch.nn.functional.linear(x, dense, layer.bias)
    check(layer(x), want, EXPORT)
    assert "nf4" in repr(layer)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.uint8
