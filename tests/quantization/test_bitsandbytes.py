"""Weights that bitsandbytes repacked for a CPU: converted back exactly, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from quantized_models import bnb, quantized, to_bitsandbytes
from torch import nn

import lorasb
from lorasb.functional import dequantize
from lorasb.layers.linear import LoRASBLinear


def repacked(dtype: torch.dtype, nested: bool) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    dense = nn.Linear(128, 64, bias=False).to(dtype)
    layer = to_bitsandbytes(dense, "nf4 nested" if nested else "nf4").eval()
    layer.support_avx512bf16_for_cpu = True
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    return layer


def test_what_bitsandbytes_repacked_is_converted_back_exactly_where_that_is_possible() -> None:
    want = to_bitsandbytes((torch.manual_seed(0), nn.Linear(128, 64, bias=False).bfloat16())[1], "nf4")
    layer = LoRASBLinear(repacked(torch.bfloat16, False), "default", 4)
    base = layer.base_layer
    assert torch.equal(base.weight.data, want.weight.data)
    assert torch.equal(base.weight.quant_state.absmax, want.weight.quant_state.absmax)
    assert torch.equal(
        dequantize(base.weight), bnb.functional.dequantize_4bit(want.weight.data, want.weight.quant_state)
    )
    assert not base.support_avx512bf16_for_cpu
    base.eval()(torch.randn(1, 128).bfloat16())
    assert torch.equal(base.weight.data, want.weight.data), (
        "bitsandbytes' own forward leaves the weight alone from now on"
    )


@pytest.mark.parametrize(
    ("dtype", "nested", "why"), [(torch.float32, False, "float32"), (torch.bfloat16, True, "nested statistics")]
)
def test_what_cannot_be_converted_back_is_refused_with_the_reason(dtype: torch.dtype, nested: bool, why: str) -> None:
    model = nn.Sequential(repacked(dtype, nested))
    with pytest.raises(ValueError, match=rf"'0'.*{why}.*load the model again"):
        lorasb.patch(model, target_modules=["0"])
    assert type(model[0]) is bnb.nn.Linear4bit


def test_every_4_bit_layer_of_a_patched_model_stays_as_it_is_packed() -> None:
    model = quantized("nf4", torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
    model = lorasb.patch(model, r=4, target_modules=["q_proj"])
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
