"""From tensors to launches of the gradient accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_sizes import GemmConfig, cdiv, gradient_config
from .gradient_signs import grad_sign
from .launcher import Launch, launch
from .operands import needs_int64, on_device, precision, unit_rows

COUNTS = 3  # of a tile: Σ G², exact zeros, entries that are not finite


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool, arch: str) -> None:
    """total [N, K] fp32 (+)= dyᵀ x, for dy [M, N] and x [M, K]."""
    _launch(dy, x, total, fresh, None, gradient_config(x.shape[1], x.element_size(), arch))


def gradient_signs(
    dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool, arch: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and nonzero places of total + dyᵀ x, as words [N, ceil(K/32)]; and Σ G², zeros, not finite, in fp64."""
    N, K = dy.shape[1], x.shape[1]
    words = x.new_empty((N, cdiv(K, 32)), dtype=torch.int32)
    nonzero, config = torch.empty_like(words), gradient_config(K, x.element_size(), arch)
    tiles = cdiv(N, config.block_m) * cdiv(K, config.block_n)
    counts = x.new_empty((tiles, COUNTS), dtype=torch.float32)
    _launch(dy, x, total, fresh, (words, nonzero, counts), config)
    return words, nonzero, counts.sum(0, dtype=torch.float64)


def _launch(
    dy: Tensor,
    x: Tensor,
    total: Tensor | None,
    fresh: bool,
    signs: tuple[Tensor, Tensor, Tensor] | None,
    config: GemmConfig,
) -> None:
    dy, x = unit_rows(dy), unit_rows(x)
    (M, N), K = dy.shape, x.shape[1]
    block_m, block_n, block_k = config.block_k, config.block_m, config.block_n  # the config's names are of G's tile
    tiles = cdiv(N, block_n) * cdiv(K, block_k)
    if tiles == 0:
        return
    accumulator = total if total is not None else x.new_empty(1, dtype=torch.float32)
    words, nonzero, counts = signs or (accumulator.view(torch.int32), accumulator.view(torch.int32), accumulator)
    arguments = dict(
        dy=dy,
        x=x,
        total=accumulator,
        words=words,
        nonzero=nonzero,
        counts=counts,
        M=M,
        N=N,
        K=K,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        stride_total=K,
        stride_words=cdiv(K, 32),
        FRESH=fresh or total is None,
        KEEP=total is not None and (M > 0 or fresh),  # no tokens leave a sum as it is, unless it is to become zero
        SIGNS=signs is not None,
        EVEN=N % block_n == 0 and K % block_k == 0,
        EVEN_M=M % block_m == 0,
        WIDE=needs_int64(dy, x, accumulator),
        PRECISION=precision(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_N=config.group,
    )
    with on_device(x):
        launch(Launch(grad_sign, tiles, arguments, config))
