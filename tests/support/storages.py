"""Quantized weights for tests, and their values, decoded in as few lines as possible without the library's code."""

from dataclasses import replace
from typing import Any

import torch
from reference import Case, make_case
from torch import Tensor

from lorasb.quantization.quantized_weight import QuantizedWeight, of_state
from lorasb.quantization.quantizer import quantize_4bit


def storage(
    m: int,
    n: int,
    kind: str = "nf4",
    block: int = 64,
    nested: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> QuantizedWeight:
    """A random weight in 4 bits."""
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / max(1, n) ** 0.5
    return of_state(*quantize_4bit(weight.to(dtype), kind, block, nested))


def quantized_case(weight: QuantizedWeight, rows: int, r: int, dtype: torch.dtype, **options: Any) -> Case:
    """Random inputs of an adapted linear over a quantized weight."""
    m, n = weight.shape
    return replace(make_case((rows,), n, m, r, dtype, **options), weight=weight)


def octets(m: int, n: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> QuantizedWeight:
    """A random weight in 8 bits."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (m, n), generator=g, dtype=torch.int8)
    return QuantizedWeight([codes, torch.rand(m, generator=g) + 0.1], (m, n), dtype, "int8")


def exact(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W [out, in] in fp32, then rounded to the storage's dtype."""
    return unrounded(weight).to(weight.dtype).to(dtype)


def unrounded(weight: QuantizedWeight) -> Tensor:
    """W [out, in] in fp32, each element decoded separately."""
    m, n = weight.shape
    if weight.kind == "int8":
        return weight.tensors[0].float() * weight.tensors[1][:, None] * 7.874015718698502e-3
    octet, table = weight.tensors[0].long(), weight.tensors[2]
    nibbles = torch.stack((octet >> 4, octet & 15), 1).flatten()[: m * n]
    scales = weight.tensors[1]
    if weight.nested:
        places = torch.arange(len(scales))
        scales = weight.tensors[4][scales.long()] * weight.tensors[3][places // weight.block2] + weight.tensors[5]
    return (table[nibbles] * scales[torch.arange(m * n) // weight.block]).view(m, n)


def bits_of(tensor: Tensor) -> Tensor:
    """The bit patterns, so that -0 and NaN count."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
