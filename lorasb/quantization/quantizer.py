"""The quantizer: a weight in 4 bits, to the bit as bitsandbytes quantizes it, without bitsandbytes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .quant_state import QuantState

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
NESTED_BLOCK = 256
GRID = 65536  # bitsandbytes rounds a scale to this grid before it looks up the nearest of 256 entries
CHUNK = 1 << 22  # elements quantized at a time


@torch.no_grad()
def quantize_4bit(
    weight: Tensor, kind: str = "nf4", blocksize: int = 64, nested: bool = False
) -> tuple[Tensor, QuantState]:
    """W as bytes [ceil(W's elements / 2), 1] and statistics, bit-equal to bitsandbytes' `quantize_4bit` on this device.

    Each block is divided by its largest absolute value; each element becomes the nearest entry of the table.
    """
    table = code(kind).to(weight.device)
    order = torch.argsort(table)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    flat, count = weight.reshape(-1), weight.numel()
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=weight.device)
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=weight.device)
    step = CHUNK // blocksize * blocksize
    for first in range(0, count, step):
        part = flat[first : first + step].float()
        scaled, largest = _scale(part, blocksize)
        absmax[first // blocksize : first // blocksize + len(largest)] = largest
        nearest = torch.bucketize(scaled, bounds, out_int32=True)
        nibbles = nearest.to(torch.uint8) if kind == "nf4" else order[nearest].to(torch.uint8)
        nibbles = torch.nn.functional.pad(nibbles, (0, len(nibbles) % 2), value=int(_zero(kind)))
        packed[first // 2 : first // 2 + len(nibbles) // 2] = (nibbles[::2] << 4) | nibbles[1::2]
    state = QuantState(absmax, table, blocksize, kind, weight.shape, weight.dtype)
    return packed[:, None], _nest(state) if nested else state


def _scale(part: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The part over its blocks' largest values, and these; a last, shorter block is divided, the others multiplied."""
    full = len(part) // block * block
    whole, rest = part[:full].view(-1, block), part[full:]
    absmax = whole.abs().amax(-1)
    scaled = (whole * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)
    if not len(rest):
        return scaled, absmax
    largest = rest.abs().max().clamp(min=1e-38)
    return torch.cat((scaled, (rest / largest).clamp(-1, 1))), torch.cat((absmax, largest[None]))


def _zero(kind: str) -> int:
    """The nibble of an exact zero, which fills up the last byte."""
    return 7 if kind == "nf4" else 0


def _nest(state: QuantState) -> QuantState:
    """The scales in 8 bits, relative to their mean, in blocks of 256."""
    offset = state.absmax.mean()
    relative, table = state.absmax - offset, dynamic_map().to(state.absmax.device)
    blocks = -(-len(relative) // NESTED_BLOCK)
    padded = torch.nn.functional.pad(relative, (0, blocks * NESTED_BLOCK - len(relative))).view(blocks, NESTED_BLOCK)
    largest = padded.abs().amax(-1)
    scaled = padded * (1.0 / largest)[:, None]
    octets = torch.where(largest[:, None] == 0, 0, _nearest(scaled, table)).to(torch.uint8).view(-1)[: len(relative)]
    state2 = QuantState(largest, table, NESTED_BLOCK)
    return QuantState(octets, state.code, state.blocksize, state.quant_type, state.shape, state.dtype, offset, state2)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Places in the table: on a CPU by way of bitsandbytes' grid, on a GPU the nearest entry."""
    if values.is_cuda:
        return torch.bucketize(values.clamp(-1, 1), (table[:-1] + table[1:]) / 2, out_int32=True)
    place = ((values.clamp(-1, 1) + 1.0) * 0.5 * (GRID - 1) + 0.5).nan_to_num().int()
    return _grid().to(values.device)[place.long()]


@lru_cache(maxsize=1)
def _grid() -> Tensor:
    """The nearest entry of the dynamic table for every place of the grid; of two equally near the lower."""
    table = dynamic_map()
    values = torch.arange(GRID, dtype=torch.float32) / (GRID - 1) * 2.0 - 1.0
    right = torch.searchsorted(table, values).clamp(1, len(table) - 1)
    nearer = (table[right] - values).abs() < (values - table[right - 1]).abs()
    return torch.where(nearer, right, right - 1)


@lru_cache(maxsize=2)
def code(kind: str) -> Tensor:
    """The sixteen values of NF4 (QLoRA, appendix E) or of FP4 (sign, two bits of exponent, one of mantissa)."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    return table / table.abs().max()


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The 256 values of the dynamic 8-bit type: a decimal exponent, and what bits are left for a fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist() + (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
