"""4-bit quantization of a weight, bit-equal to bitsandbytes': this determines where to multiply by a reciprocal,
where to divide, and which of two equally near table entries to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .quantized_weight import QuantState

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022833334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
# By nibble: sign, two bits of exponent, one of mantissa; `code` divides by the largest, 12.
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
NESTED_BLOCK = 256  # scales that share a scale, as in bitsandbytes
GRID = 65536  # bitsandbytes' CPU kernel rounds a value in [-1, 1] to this grid, and looks up the nearest entry by it
CHUNK = 1 << 22  # elements quantized at a time, which bounds temporaries to a few times 16 MB


@torch.no_grad()
def quantize_4bit(
    weight: Tensor, kind: str = "nf4", blocksize: int = 64, nested: bool = False
) -> tuple[Tensor, QuantState]:
    """Packed nibbles [ceil(out·in / 2), 1] and statistics of W, bit-equal to bitsandbytes' on the weight's device."""
    table = code(kind).to(weight.device)
    order = torch.argsort(table)  # FP4's table is not sorted by value; NF4's is
    # Midpoints between neighbors: bucketize by them gives the nearest entry, and the lower one in a tie.
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    flat, count = weight.reshape(-1), weight.numel()
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=weight.device)
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=weight.device)
    step = CHUNK // blocksize * blocksize  # whole blocks, and even, so that a chunk starts at a full byte
    for first in range(0, count, step):
        chunk = flat[first : first + step].float()
        scaled, largest = _scale(chunk, blocksize)
        absmax[first // blocksize : first // blocksize + len(largest)] = largest
        nearest = torch.bucketize(scaled, bounds, out_int32=True)
        nibbles = nearest.to(torch.uint8) if kind == "nf4" else order[nearest].to(torch.uint8)
        # an odd number of elements is padded with the nibble of zero
        nibbles = torch.nn.functional.pad(nibbles, (0, len(nibbles) % 2), value=7 if kind == "nf4" else 0)
        packed[first // 2 : first // 2 + len(nibbles) // 2] = (nibbles[::2] << 4) | nibbles[1::2]
    state = QuantState(absmax, table, blocksize, kind, weight.shape, weight.dtype)
    return packed[:, None], _nest(state) if nested else state


def _scale(chunk: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Elements [n] divided by their blocks' absmax, and the absmax [ceil(n / block)]."""
    # As in bitsandbytes, full blocks are multiplied by the reciprocal and a last, partial block is divided, which may
    # differ in the last bit. The divisor is at least 1e-38, for blocks of zeros.
    full = len(chunk) // block * block
    blocks, partial = chunk[:full].view(-1, block), chunk[full:]
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)
    if not len(partial):
        return scaled, absmax
    largest = partial.abs().max().clamp(min=1e-38)
    return torch.cat((scaled, (partial / largest).clamp(-1, 1))), torch.cat((absmax, largest[None]))


def _nest(state: QuantState) -> QuantState:
    """Quantize the scales to 8 bits, relative to their mean, in blocks of 256."""
    offset = state.absmax.mean()
    relative, table = state.absmax - offset, dynamic_map().to(state.absmax.device)
    blocks = -(-len(relative) // NESTED_BLOCK)
    padded = torch.nn.functional.pad(relative, (0, blocks * NESTED_BLOCK - len(relative))).view(blocks, NESTED_BLOCK)
    largest = padded.abs().amax(-1)
    scaled = (padded * (1.0 / largest)[:, None]).clamp(-1, 1)
    if scaled.is_cuda:  # bitsandbytes finds the nearest table entry exactly on a GPU, by its grid on a CPU
        nearest = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
    else:
        index = ((scaled + 1.0) * 0.5 * (GRID - 1) + 0.5).nan_to_num().int()
        nearest = _grid().to(scaled.device)[index.long()]
    # A block of zeros, which was divided by zero above, gets code 0, as in bitsandbytes.
    octets = torch.where(largest[:, None] == 0, 0, nearest).to(torch.uint8).view(-1)[: len(relative)]
    # `quant_type` of `state2` stays None: these codes index an 8-bit table, not a 4-bit one.
    return replace(state, absmax=octets, offset=offset, state2=QuantState(largest, table, NESTED_BLOCK))


def _cached(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a table as a plain CPU tensor, even if the first call is on another device or in inference mode."""

    @lru_cache
    def made(*given: str) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*given)

    return made


@_cached
def _grid() -> Tensor:
    """Index of the nearest entry of the dynamic map for every grid point [GRID]; the lower one in a tie."""
    table = dynamic_map()
    values = torch.arange(GRID, dtype=torch.float32) / (GRID - 1) * 2.0 - 1.0
    right = torch.searchsorted(table, values).clamp(1, len(table) - 1)
    nearer = (table[right] - values).abs() < (values - table[right - 1]).abs()
    return torch.where(nearer, right, right - 1)


@_cached
def code(kind: str) -> Tensor:
    """The table [16] of NF4 (QLoRA, appendix E) or FP4, scaled to a largest absolute value of 1."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float32)
    return table / table.abs().max()


@_cached
def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type: sign, decimal exponent, and a fraction in the rest."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist() + (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
