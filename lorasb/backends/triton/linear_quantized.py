"""The kernels over weights in 4 bits: for CUDA, and for an explicit backend under Triton's interpreter.

Weights in 8 bits have none of their own: they are dequantized in torch, then the dense kernels run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..eager import linear as eager
from ..eager import linear_quantized as eager_quantized
from . import linear as triton
from .linear import check_call, register_pairs


def linear(
    x: Tensor,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + s·u Rᵀ Bᵀ + bias [..., out] and u = x Aᵀ [M, r]."""
    if len(quant) == 2:
        weight = dequantize(quant, layout, b.shape[0], a.shape[1], x.dtype)
        return triton.forward(x, weight, a, core, b, bias, scaling, dropout, seed)
    from lorasb.kernels import linear as launch
    from lorasb.kernels import linear_quantized as quantized

    rows = triton.rows_of(x)
    members = launch.Members([None], [a], [core], [b], [scaling / (1.0 - dropout)])
    weight, plan = _weight(quant, layout, b, a), triton.plan_of("forward", rows, [b], a, "4bit")
    y, u = quantized.forward(rows, weight, members, bias, plan, triton.mask_of(dropout, seed))
    return eager.shaped(y, x), u


def linear_backward(
    dy: Tensor,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    core: Tensor,
    b: Tensor,
    u: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dcore: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is returned empty."""
    if len(quant) == 2:
        weight = dequantize(quant, layout, b.shape[0], a.shape[1], dy.dtype)
        return triton.backward(dy, weight, a, core, b, u, scaling, dropout, seed, need_dx, need_dcore)
    from lorasb.kernels import linear as launch
    from lorasb.kernels import linear_quantized as quantized

    rows = triton.rows_of(dy)
    members = launch.Members([None], [a], [core], [b], [scaling / (1.0 - dropout)])
    weight, plan = _weight(quant, layout, b, a), triton.plan_of("backward", rows, [b], a, "4bit")
    mask = triton.mask_of(dropout, seed)
    dx, dcore = quantized.backward(rows, weight, members, u, plan, need_dx, need_dcore, mask)
    return (
        eager.shaped(dx, dy) if dx is not None else dy.new_empty((0,)),
        dcore if dcore is not None else core.new_empty((0,)),
    )


def dequantize(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [rows, columns]."""
    if len(quant) == 2:
        return eager_quantized.dequantize(quant, layout, rows, columns, dtype)
    from lorasb.kernels import linear_quantized as quantized

    check_call(quant[1].new_empty(0, dtype=torch.float32))
    weight = quantized.Quantized(quant, *layout, rows, columns)
    return quantized.dequantized(weight, dtype)


def _weight(quant: list[Tensor], layout: list[int], b: Tensor, a: Tensor) -> Any:
    from lorasb.kernels import linear_quantized as quantized

    return quantized.Quantized(quant, *layout, b.shape[0], a.shape[1])


def _or_eager_without_rank(kernel: Any, plain: Any) -> Any:
    """The kernel; without an adapter (r = 0) there is nothing for it to fuse."""

    def call(*arguments: Any) -> Any:
        return (kernel if arguments[3].shape[0] else plain)(*arguments)

    return call


def register() -> None:
    """Register for CUDA and the CPU, and for `auto` on CUDA with eager torch behind."""
    register_pairs(
        {
            "linear_quantized": (_or_eager_without_rank(linear, eager_quantized.linear), eager_quantized.linear),
            "linear_quantized_backward": (
                _or_eager_without_rank(linear_backward, eager_quantized.linear_backward),
                eager_quantized.linear_backward,
            ),
            "dequantize": (dequantize, eager_quantized.dequantize),
        }
    )
