"""Tiny models in 4 and 8 bits, bitsandbytes' and our own, and their dense twins."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import llama
from storages import exact
from torch import nn
from twins import batches, dense_linear, with_linears

import lorasb
from lorasb.quantization.quantized_weight import of_module

bnb = pytest.importorskip("bitsandbytes")
KINDS = ("own", "own nested", "nf4", "fp4 nested", "int8")


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


def dense_twin(model: nn.Module) -> nn.Module:
    """The same function with dense linears."""
    return with_linears(copy.deepcopy(model), lambda layer: dense_linear(exact(of_module(layer), torch.float32)))


@functools.cache
def made(kind: str, strategy: str) -> nn.Module:
    model = lorasb.patch(quantized(kind), r=4)
    lorasb.initialize(model, batches(), lr=1e-2, progress=False, strategy=strategy)
    return model


def initialized(kind: str, strategy: str = "auto") -> nn.Module:
    """A quantized model with an initialized adapter, of the test's own."""
    return copy.deepcopy(made(kind, strategy))
