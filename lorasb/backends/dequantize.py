"""Dequantization in plain torch, some blocks at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantization.quantized_weight import FOUR_BIT, INT8, QuantizedTensors

CHUNK = 1 << 20  # elements dequantized at a time: 4 MB in fp32
ROUNDINGS = (None, torch.bfloat16, torch.float16)  # by the code in `layout`
INT8_SCALE = 7.874015718698502e-3  # 1 / 127, with the digits of bitsandbytes' constant


def dequantize(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [rows, columns]: table[nibble]·absmax in fp32, rounded as `layout` says."""
    rounding = ROUNDINGS[layout[2]]
    if QuantizedTensors.of(quant).kind == INT8:
        codes, scales = quant
        wide = codes.view(rows, columns).float() * scales.view(-1, 1) * INT8_SCALE
        return wide.to(rounding).to(dtype) if rounding is not None else wide.to(dtype)
    octets, table, block = quant[0], quant[2], layout[0]
    # [256, 2]: the values of a byte's high and low nibble, so that one look-up decodes both.
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)
    scales, count = block_scales(quant, layout), rows * columns
    out = torch.empty(count, dtype=dtype, device=octets.device)
    step = max(block, CHUNK // block * block)  # whole blocks, which start at a byte
    for first in range(0, count, step):
        last = min(first + step, count)
        values = torch.nn.functional.embedding(octets[first // 2 : (last + 1) // 2].int(), pairs).flatten()
        values = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)  # the last may be partial
        scale = scales[first // block : first // block + len(values)]
        wide = (values * scale[:, None]).flatten()[: last - first]
        out[first:last] = wide if rounding is None else wide.to(rounding)
    return out.view(rows, columns)


def block_scales(quant: list[Tensor], layout: list[int]) -> Tensor:
    """The fp32 scale of each block: absmax, or table2[absmax8]·absmax2 + offset."""
    if QuantizedTensors.of(quant).kind == FOUR_BIT:
        return quant[1]
    _, octets, _, absmax, table, offset = quant
    scales = torch.nn.functional.embedding(octets.int(), table[:, None]).flatten()
    # rounded separately, as in bitsandbytes: a fused multiply-add would differ in the last bit
    scales = scales * absmax.repeat_interleave(layout[1])[: len(scales)]
    return scales + offset
