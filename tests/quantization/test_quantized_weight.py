"""What of a module is a quantized weight: storages that are not whole are refused by name, and bytes are counted."""

from __future__ import annotations

import pytest
import torch
from quantized_models import bnb, to_bitsandbytes
from torch import nn

import lorasb
from lorasb.layers.linear import LoRASBLinear
from lorasb.quantization.quantized_weight import of_module
from lorasb.quantization.quantizer import quantize_4bit


def broken(harm: str) -> nn.Module:
    layer = to_bitsandbytes(nn.Linear(128, 64), "nf4")
    state = layer.weight.quant_state
    if harm == "short":
        layer.weight.data = layer.weight.data[:-8]
    elif harm == "statistics":
        state.absmax = state.absmax[:-1]
    elif harm == "block":
        state.blocksize = 48
    elif harm == "shape":
        state.shape = torch.Size([64, 96])
    elif harm == "nan":
        state.absmax[5] = float("nan")
    elif harm == "type":
        state.quant_type = "int4"
    elif harm == "unquantized":
        return bnb.nn.Linear4bit(128, 64)
    elif harm == "scales":
        layer = to_bitsandbytes(nn.Linear(128, 64), "int8")
        layer.weight.SCB = layer.weight.SCB[:-1]
    elif harm == "16 bits":
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=True)
    return layer


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("short", "4096 bytes"),
        ("statistics", "128 scales"),
        ("block", "block size"),
        ("shape", "bytes"),
        ("nan", "NaN or Inf"),
        ("type", "'int4'"),
        ("unquantized", "not been quantized"),
        ("scales", "64 row scales"),
        ("16 bits", "16-bit weights"),
    ],
)
def test_a_storage_that_is_not_whole_is_refused_by_name_and_the_model_stays(harm: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), broken(harm))
    kind = type(model[1])
    with pytest.raises((ValueError, TypeError), match=rf"target '1'.*{message}"):
        lorasb.patch(model, target_modules=["0", "1"])
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is kind


def test_4_bits_take_little_more_than_a_quarter_of_16() -> None:
    for nested, bound in ((False, 0.2813), (True, 0.2585)):
        dense = torch.randn(256, 1024).bfloat16()
        packed, state = quantize_4bit(dense, "nf4", 64, nested)
        parameter = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        layer = nn.Module()
        layer.weight, layer.bias = parameter, None
        found = of_module(layer)
        constant = 64 + (256 * 4 if nested else 0)  # the tables, whatever the size
        assert (found.nbytes - constant) / (dense.numel() * 2) <= bound


def test_a_dense_base_is_no_quantized_weight() -> None:
    layer = LoRASBLinear(nn.Linear(64, 32), "default", 4)
    assert layer.quantized() is None
    assert layer.base.dtype == torch.float32
