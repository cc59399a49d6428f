"""Torch ops without a derivative; for `quant` and `layout` see `calls.Operands`. The gradients are summed in a
fixed order over tokens and calls, so results are reproducible bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.bit_packing import words_of
from .registry import define

SQUARES, ZEROS, BAD = 0, 1, 2  # indices into the third result of `gradient_signs`: Σ G², zeros, NaN or Inf entries
# G [m, n] += dyᵀ x in fp32, with dy [M, m] and x [M, n]
ADD = "(Tensor dy, Tensor x, Tensor(a!) total, bool fresh) -> ()"
# The signs of G + dyᵀ x, packed 32 per word, and statistics
SIGNS = "(Tensor dy, Tensor x, Tensor(a!)? total, bool fresh) -> (Tensor, Tensor, Tensor)"
DEQUANTIZE = "(Tensor[] quant, int[] layout, int rows, int columns, ScalarType dtype) -> Tensor"
# y alone, for calls that record no gradient; takes `QuantizedWeight.storage_layout`, casts as autocast does and checks
# its arguments itself. Not all backends have it.
SERVE = (
    "(Tensor x, Tensor[] quant, int[] layout, int rows, int columns, Tensor? a, Tensor? core, Tensor? b, "
    "Tensor? bias, float scaling) -> Tensor"
)


def _add_fake(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    return None


def _signs_fake(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    return words, torch.empty_like(words), x.new_empty((3,), dtype=torch.float64)


def _dequantize_fake(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return quant[0].new_empty((rows, columns), dtype=dtype)


def _serve_fake(x: Tensor, quant: list[Tensor], layout: list[int], rows: int, *_: object) -> Tensor:
    cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.get_autocast_dtype("cpu") if cast else x.dtype)


for _name, _schema, _fake in (
    ("gradient_add", ADD, _add_fake),
    ("gradient_signs", SIGNS, _signs_fake),
    ("dequantize", DEQUANTIZE, _dequantize_fake),
    ("serve_quantized", SERVE, _serve_fake),
):
    define(_name, _schema, _fake)
