"""Weight gradients as torch ops: accumulation of `dyᵀ x` in fp32, and the signs of the sum, packed 32 per word.

    G [m, n] += dyᵀ x        dy [M, m], x [M, n]

Initialization calls them. The summation order over tokens and calls is fixed, so results are reproducible bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.bit_packing import words_of
from .registry import define_plain

ADD = "(Tensor dy, Tensor x, Tensor(a!) total, bool fresh) -> ()"
SIGNS = "(Tensor dy, Tensor x, Tensor(a!)? total, bool fresh) -> (Tensor, Tensor, Tensor)"
SQUARES, ZEROS, BAD = 0, 1, 2  # indices into the third result of `gradient_signs`: Σ G², zeros, NaN or Inf entries


def _add_fake(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    return None


def _signs_fake(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    return words, torch.empty_like(words), x.new_empty((3,), dtype=torch.float64)


define_plain("gradient_add", ADD, _add_fake)
define_plain("gradient_signs", SIGNS, _signs_fake)
