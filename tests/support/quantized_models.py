"""Tiny models in 4 and 8 bits, bitsandbytes' and our own."""

from __future__ import annotations

import pytest
import torch
from models import llama
from torch import nn
from twins import with_linears

import lorasb

bnb = pytest.importorskip("bitsandbytes")
STORED = ("own", "own nested", "nf4", "fp4 nested", "int8")  # storages that lorasb reads itself


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = llama().to(dtype)
    if kind.startswith("own"):
        return lorasb.quantize(model, nested="nested" in kind)
    return with_linears(model, lambda layer: to_bitsandbytes(layer, kind))


def to_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Module:
    bias = layer.bias is not None
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind[:3], "compress_statistics": "nested" in kind}
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=bias, **options)
        new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), **options)
    if bias:
        new.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return new.to("cpu")
