"""From tensors to launches of the gradient accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_sizes import cdiv, gradient_config
from .gradient_signs import grad_sign
from .launcher import launch
from .linear import on_device, precision, unit_rows, wide

COUNTS = 3


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [N, K] fp32 (+)= dyᵀ x, for dy [M, N] and x [M, K]."""
    _launch(dy, x, total, fresh, None)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and nonzero places of total + dyᵀ x, as words [N, ceil(K/32)]; and Σ G², zeros, not finite, in fp64."""
    N, K = dy.shape[1], x.shape[1]
    words = x.new_empty((N, cdiv(K, 32)), dtype=torch.int32)
    nonzero, config = torch.empty_like(words), gradient_config(K, x.element_size())
    tiles = cdiv(N, config.block_m) * cdiv(K, config.block_n)
    counts = x.new_empty((tiles, COUNTS), dtype=torch.float32)
    _launch(dy, x, total, fresh, (words, nonzero, counts))
    return words, nonzero, counts.sum(0, dtype=torch.float64)


def _launch(
    dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool, signs: tuple[Tensor, Tensor, Tensor] | None
) -> None:
    dy, x = unit_rows(dy), unit_rows(x)
    (M, N), K, config = dy.shape, x.shape[1], gradient_config(x.shape[1], x.element_size())
    BM, BN, BK = config.block_k, config.block_m, config.block_n
    tiles = cdiv(N, BN) * cdiv(K, BK)
    if tiles == 0:
        return
    room = total if total is not None else x.new_empty(1, dtype=torch.float32)
    words, nonzero, counts = signs or (room.view(torch.int32), room.view(torch.int32), room)
    arguments = dict(
        dy=dy, x=x, total=room, words=words, nonzero=nonzero, counts=counts, M=M, N=N, K=K, sdy=dy.stride(0),
        sx=x.stride(0), st=K, sw=cdiv(K, 32), FRESH=fresh or total is None,
        KEEP=total is not None and (M > 0 or fresh), SIGNS=signs is not None, EVEN=N % BN == 0 and K % BK == 0,
        EVEN_M=M % BM == 0, WIDE=wide(dy, x, room), PRECISION=precision(x.dtype), BM=BM, BN=BN, BK=BK,
        GROUP=config.group,
    )  # fmt: skip
    with on_device(x):
        launch(grad_sign, tiles, arguments, config)
