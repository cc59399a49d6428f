"""Booleans packed 32 a word, row by row: bit j of word w of a row is its column 32·w + j."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WORD = 32


def words_of(columns: int) -> int:
    """Words that a row of `columns` takes."""
    return -(-columns // WORD)


def pack_words(flags: Tensor) -> Tensor:
    """Booleans [m, n] as words [m, ceil(n / 32)], int32; what lies beyond n is 0."""
    m, n = flags.shape
    room = words_of(n) * WORD
    if n % WORD:
        flags = torch.nn.functional.pad(flags, (0, room - n))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    octets = (flags.reshape(m, room // 8, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def unpack_words(words: Tensor, columns: int, zero: float, one: float, dtype: torch.dtype) -> Tensor:
    """Words [m, w] as a matrix [m, columns] of two values, for bits 0 and 1."""
    octets = words.contiguous().view(torch.uint8).int()
    found = torch.nn.functional.embedding(octets, _octet_table(zero, one, dtype, words.device))
    return found.flatten(1)[:, :columns]


@lru_cache
def _octet_table(zero: float, one: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight values that a byte stands for."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)[None, :]) & 1
    return torch.where(bits == 1, one, zero).to(device, dtype)
