"""Torch ops without a derivative, and the packed words that `gradient_signs` returns.

For `quant` and `layout` see `calls.Operands`. Gradients are summed in a fixed order over tokens and calls, so results
are reproducible bit for bit. Words are boolean matrices packed 32 columns per int32: bit j of word w in a row is its
column 32·w + j.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .registry import define

WORD = 32  # columns

SQUARES, ZEROS, BAD = 0, 1, 2  # indices into the third result of `gradient_signs`: Σ G², zeros, NaN or Inf entries


def words_of(columns: int) -> int:
    return -(-columns // WORD)


def pack_words(flags: Tensor) -> Tensor:
    """Booleans [m, n] packed to words [m, ceil(n / 32)], int32; bits beyond column n are 0."""
    m, n = flags.shape
    padded = words_of(n) * WORD
    if n % WORD:
        flags = torch.nn.functional.pad(flags, (0, padded - n))
    # Bytes first, then a view of four as one word: torch has no uint32 sums, and bit 31 would overflow int32's.
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    octets = (flags.reshape(m, padded // 8, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def unpack_words(words: Tensor, columns: int, zero: float, one: float, dtype: torch.dtype) -> Tensor:
    """Words [m, w] unpacked to a matrix [m, columns] with the value `zero` for bits 0 and `one` for bits 1."""
    octets = words.contiguous().view(torch.uint8).int()  # embedding takes no uint8 indices
    values = torch.nn.functional.embedding(octets, _octet_table(zero, one, dtype, words.device))
    return values.flatten(1)[:, :columns]


@lru_cache
def _octet_table(zero: float, one: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight values that each byte unpacks to."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)[None, :]) & 1
    return torch.where(bits == 1, one, zero).to(device, dtype)


def _signs_fake(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    return words, torch.empty_like(words), x.new_empty((3,), dtype=torch.float64)


def _dequantize_fake(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return quant[0].new_empty((rows, columns), dtype=dtype)


def _serve_fake(x: Tensor, quant: list[Tensor], layout: list[int], rows: int, *_: object) -> Tensor:
    cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.get_autocast_dtype("cpu") if cast else x.dtype)


# G [m, n] += dyᵀ x in fp32, with dy [M, m] and x [M, n]
define("gradient_add", "(Tensor dy, Tensor x, Tensor(a!) total, bool fresh) -> ()", lambda *_: None)
# The signs of G + dyᵀ x, packed 32 per word, and statistics
SIGNS = "(Tensor dy, Tensor x, Tensor(a!)? total, bool fresh) -> (Tensor, Tensor, Tensor)"
define("gradient_signs", SIGNS, _signs_fake)
DEQUANTIZE = "(Tensor[] quant, int[] layout, int rows, int columns, ScalarType dtype) -> Tensor"
define("dequantize", DEQUANTIZE, _dequantize_fake)
# y alone, for calls that record no gradient; takes `QuantizedWeight.layout()`, casts as autocast does and checks
# its arguments itself. Not all backends have it.
SERVE = (
    "(Tensor x, Tensor[] quant, int[] layout, int rows, int columns, Tensor? a, Tensor? core, Tensor? b, "
    "Tensor? bias, float scaling) -> Tensor"
)
define("serve_quantized", SERVE, _serve_fake)
