"""Boolean matrices packed 32 columns per int32 word: bit j of word w in a row is its column 32·w + j."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WORD = 32


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
