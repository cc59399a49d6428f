"""Dropout masks on the adapters' x, drawn from a seed, so that backward draws them again and none is stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_masks = threading.local()  # `philox` is set while eager computes in place of a Triton kernel


@contextmanager
def kernel_masks() -> Iterator[None]:
    """Inside, dropout uses the Triton kernels' mask: a fallback in one direction whose other one ran a kernel."""
    _masks.philox = True
    try:
        yield
    finally:
        _masks.philox = False


def kernel_dropout(dropout: float) -> float:
    """The probability of the kernels' masks: the nearest multiple of 2^-16, strictly between 0 and 1."""
    if not 0.0 < dropout < 1.0:
        return dropout
    return min(max(round(dropout * 2**16), 1), 2**16 - 1) / 2**16


def philox_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """The Triton kernels' mask [M, n] by Philox-4x32-10: True where 16 random bits are at least dropout·2^16."""
    # 32-bit words in int64. Counter (column // 8, row, 0, 0) gives eight columns a half word each, lower halves first.
    low, (M, n) = 0xFFFFFFFF, shape
    c0 = torch.arange(-(-n // 8), device=device).expand(M, -1)
    c1 = torch.arange(M, device=device)[:, None].expand(c0.shape)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps, but keeps all 64 bits; `>> 32` is the high word
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).view(M, -1)[:, :n]
    return halves >= kernel_dropout(dropout) * 2**16


def kept(dropout: float) -> float:
    return 1.0 - (kernel_dropout(dropout) if getattr(_masks, "philox", False) else dropout)


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor, device: torch.device) -> Tensor:
    """The mask [M, n] of the elements that dropout keeps."""
    if getattr(_masks, "philox", False):
        return philox_mask(shape, dropout, int(seed), device)
    # A separate generator: the global random state advances by the draw of the seed alone.
    generator = torch.Generator(device=device).manual_seed(int(seed))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - dropout, generator=generator)
