"""The kernels over weights in 4 bits: for CUDA, and for an explicit backend under Triton's interpreter.

Weights in 8 bits have none of their own: they are dequantized in torch, then the dense kernels run. What `quant` and
`layout` hold is said in ops/linear_quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quantization.quantized_weight import INT8, QuantizedTensors
from ..eager import linear as eager
from ..eager import linear_quantized as eager_quantized
from . import linear as triton
from .linear import check_call, register_pairs
from .masks import mask_of


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
    if QuantizedTensors.of(quant).kind == INT8:
        weight = dequantize(quant, layout, b.shape[0], a.shape[1], x.dtype)
        return triton.forward(x, weight, a, core, b, bias, scaling, dropout, seed)
    from lorasb.kernels import linear_quantized as kernels

    rows = triton.rows_of(x)
    y, u = kernels.forward(
        rows,
        weight=_weight(quant, layout, b.shape[0], a.shape[1]),
        members=triton.resolved(triton.members_of(None, a, core, b, scaling, dropout)),
        bias=None if bias is None else bias.resolve_neg(),
        plan=triton.plan_of("forward", rows, [b], a, quant="4bit"),
        mask=mask_of(dropout, seed),
    )
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
    if QuantizedTensors.of(quant).kind == INT8:
        weight = dequantize(quant, layout, b.shape[0], a.shape[1], dy.dtype)
        return triton.backward(dy, weight, a, core, b, u, scaling, dropout, seed, need_dx, need_dcore)
    from lorasb.kernels import linear_quantized as kernels

    rows = triton.rows_of(dy)
    dx, dcore = kernels.backward(
        rows,
        weight=_weight(quant, layout, b.shape[0], a.shape[1]),
        members=triton.resolved(triton.members_of(None, a, core, b, scaling, dropout)),
        u=u,
        plan=triton.plan_of("backward", rows, [b], a, quant="4bit"),
        need_dx=need_dx,
        need_dcore=need_dcore,
        mask=mask_of(dropout, seed),
    )
    return (
        eager.shaped(dx, dy) if dx is not None else dy.new_empty((0,)),
        dcore if dcore is not None else core.new_empty((0,)),
    )


def dequantize(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [rows, columns]."""
    tensors = QuantizedTensors.of(quant)
    if tensors.kind == INT8:
        return eager_quantized.dequantize(quant, layout, rows, columns, dtype)
    from lorasb.kernels import linear_quantized as kernels

    check_call(tensors.absmax.new_empty(0, dtype=torch.float32))  # the device; any dtype that the kernels have
    return kernels.dequantized(_weight(quant, layout, rows, columns), dtype)


def _weight(quant: list[Tensor], layout: list[int], m: int, n: int) -> Any:
    """Return the kernels' operand for W [m, n] in 4 bits."""
    from lorasb.kernels.linear_quantized import Quantized

    tensors, (block, nested_block, rounding) = QuantizedTensors.of(quant), layout
    return Quantized(
        packed=tensors.codes,
        absmax=tensors.absmax,
        codebook=tensors.codebook,
        nested_absmax=tensors.nested_absmax,
        nested_codebook=tensors.nested_codebook,
        nested_offset=tensors.nested_offset,
        block=block,
        nested_block=nested_block,
        rounding=rounding,
        m=m,
        n=n,
    )


def _or_eager_without_rank(kernel: Any, plain: Any) -> Any:
    """The kernel; without an adapter (r = 0) there is nothing for it to fuse."""

    def call(*arguments: Any) -> Any:
        a = arguments[3]  # [r, n], in `linear` and `linear_backward` alike
        return (kernel if a.shape[0] else plain)(*arguments)

    return call


def register() -> None:
    """Register for CUDA and the CPU, and for `auto` on CUDA with eager torch as the fallback."""
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
