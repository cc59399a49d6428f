"""Tiny models in 4 and 8 bits, bitsandbytes' and our own, and their dense twins."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import llama
from storages import exact
from torch import nn
from twins import batches

import lorasb
from lorasb.quantization.quantized_weight import is_quantized, of_module

bnb = pytest.importorskip("bitsandbytes")
KINDS = ("own", "own nested", "nf4", "fp4 nested", "int8")


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = llama().to(dtype)
    if kind.startswith("own"):
        return lorasb.quantize(model, nested="nested" in kind)
    for name, parent in list(model.named_modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and child != "lm_head":
                assert name
                setattr(parent, child, to_bitsandbytes(layer, kind))
    return model


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
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and is_quantized(layer):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
                dense.weight.data = exact(of_module(layer), torch.float32)
                setattr(parent, child, dense)
    return twin


@functools.cache
def made(kind: str, strategy: str) -> nn.Module:
    model = lorasb.patch(quantized(kind), r=4)
    lorasb.initialize(model, batches(), lr=1e-2, progress=False, strategy=strategy)
    return model


def initialized(kind: str, strategy: str = "auto") -> nn.Module:
    """A quantized model with an initialized adapter, of the test's own."""
    return copy.deepcopy(made(kind, strategy))
