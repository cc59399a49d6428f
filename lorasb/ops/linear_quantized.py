"""The adapted linear over a quantized weight, and dequantization, as torch ops.

    y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias        W [m, n] in 4 or 8 bits

`quant` holds the weight's tensors: [bytes, absmax, table], nested [bytes, absmax8, table, absmax2, table2, offset], or
for 8 bits [codes, row scales]. `layout` is [block, nested block, rounding]; rounding is the dtype that W is rounded to
before it is cast to x's: 0 none, 1 bf16, 2 fp16. Backward dequantizes again, so no dense W outlives a call.

`serve_quantized` returns y alone, for calls that record no gradient. Not all backends have it. It takes
`QuantizedWeight.storage_layout`, casts as autocast asks and checks its arguments itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import define, define_plain

_FORWARD = (
    "(Tensor x, Tensor[] quant, int[] layout, Tensor a, Tensor core, Tensor b, Tensor? bias, float scaling, "
    "float dropout, Tensor? seed) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dy, Tensor[] quant, int[] layout, Tensor a, Tensor core, Tensor b, Tensor u, float scaling, "
    "float dropout, Tensor? seed, bool need_dx, bool need_dcore) -> (Tensor, Tensor)"
)
_SERVE = (
    "(Tensor x, Tensor[] quant, int[] layout, int rows, int columns, Tensor? a, Tensor? core, Tensor? b, "
    "Tensor? bias, float scaling) -> Tensor"
)
_DEQUANTIZE = "(Tensor[] quant, int[] layout, int rows, int columns, ScalarType dtype) -> Tensor"


def _forward_fake(
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
    rows = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], b.shape[0])), x.new_empty((rows, a.shape[0]))


def _backward_fake(
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
    dx = dy.new_empty((*dy.shape[:-1], a.shape[1])) if need_dx else dy.new_empty((0,))
    return dx, core.new_empty(core.shape) if need_dcore else core.new_empty((0,))


def _dequantize_fake(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return quant[0].new_empty((rows, columns), dtype=dtype)


def _serve_fake(
    x: Tensor,
    quant: list[Tensor],
    layout: list[int],
    rows: int,
    columns: int,
    a: Tensor | None,
    core: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.get_autocast_dtype("cpu") if cast else x.dtype)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save u [M, r] and the packed weight, which costs nothing as the layer holds it; never x, never a dense W."""
    x, quant, layout, a, core, b, _, scaling, dropout, seed = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.need_dx, ctx.need_dcore = x.requires_grad, core.requires_grad
    ctx.save_for_backward(a, core, b, u if ctx.need_dcore else u.new_empty((0, a.shape[0])), seed, *quant)
    ctx.layout, ctx.scaling, ctx.dropout = list(layout), scaling, dropout


def derivative(op: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The function that autograd calls, which calls a backend's backward op."""

    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        need_dx, need_dcore = ctx.need_dx, ctx.need_dcore
        a, core, b, u, seed, *quant = ctx.saved_tensors
        no_grads = [None] * len(quant)
        if dy is None or not (need_dx or need_dcore):
            return None, no_grads, *(None,) * 8
        dx, dcore = op(dy, quant, ctx.layout, a, core, b, u, ctx.scaling, ctx.dropout, seed, need_dx, need_dcore)
        # One per argument: x, quant, layout, a, core, b, bias, scaling, dropout, seed.
        return dx if need_dx else None, no_grads, None, None, dcore if need_dcore else None, *(None,) * 5

    return backward


define("linear_quantized", (_FORWARD, _BACKWARD), (_forward_fake, _backward_fake), derivative, save)
define_plain("serve_quantized", _SERVE, _serve_fake)
define_plain("dequantize", _DEQUANTIZE, _dequantize_fake)
