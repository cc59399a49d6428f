"""The adapted linear with one R per row of a batch, as a torch op: A and B are shared by all.

    y_i = x_i Wᵀ + s·x_i Aᵀ R_kᵀ Bᵀ + bias    with k = index[i]        x [n, ..., in], cores [K, r, r], index [n]

Row i is x[i], a token or a sequence of them; k = -1 is the bare base. The base's product, u = x Aᵀ and the product with
B are those of one adapter for the whole batch: only v_i = s·u_i R_kᵀ differs from row to row.

W is `weight`, or quantized (`quant`, `layout`, as in `linear_quantized`), or none of them: the adapter's part alone.
The op returns y and u [M, r], M tokens. `index` is int64 on the CPU, for any device of x, so that a wrong one is an
error before any R is read. dR_k sums over its own rows in their order, with no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .registry import define

# The last two of a dense weight; not [], which torch takes for a list of tensors.
NO_QUANT: tuple[list[Tensor], list[int]] = ([], [0, 0, 0])

_FORWARD = (
    "(Tensor x, Tensor? weight, Tensor[] quant, int[] layout, Tensor a, Tensor cores, Tensor b, Tensor? bias, "
    "Tensor index, float scaling) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? weight, Tensor[] quant, int[] layout, Tensor a, Tensor cores, Tensor b, Tensor u, "
    "Tensor index, float scaling, bool need_dx, bool need_dcores) -> (Tensor, Tensor)"
)


def check_index(index: Tensor, count: int) -> None:
    """Raise an IndexError for an index [n] outside of [-1, count)."""
    if index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < -1 or high >= count:
        raise IndexError(
            f"expected index in [-1, {count}), one of {count} adapters or -1 for none, got {low if low < -1 else high}"
        )


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    cores: Tensor,
    b: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], b.shape[0])), x.new_empty((math.prod(x.shape[:-1]), a.shape[0]))


def _backward_fake(
    dy: Tensor,
    weight: Tensor | None,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    cores: Tensor,
    b: Tensor,
    u: Tensor,
    index: Tensor,
    scaling: float,
    need_dx: bool,
    need_dcores: bool,
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], a.shape[1]) if need_dx else (0,))
    return dx, cores.new_empty(cores.shape if need_dcores else (0,))


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save u [M, r], never x: dR_k = s·Σ tᵀ u over the rows of k, with t = dy B."""
    x, weight, quant, layout, a, cores, b, _, index, scaling = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.need_dx, ctx.need_dcores = x.requires_grad, cores.requires_grad
    u = u if ctx.need_dcores else u.new_empty((0, a.shape[0]))
    ctx.save_for_backward(weight, a, cores, b, u, index, *quant)
    ctx.layout, ctx.scaling = list(layout), scaling


def derivative(op: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The function that autograd calls, which calls a backend's backward op."""

    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        weight, a, cores, b, u, index, *quant = ctx.saved_tensors
        no_grads = [None] * len(quant)
        if dy is None or not (ctx.need_dx or ctx.need_dcores):
            return None, None, no_grads, *(None,) * 7
        flags = ctx.scaling, ctx.need_dx, ctx.need_dcores
        dx, dcores = op(dy, weight, quant, ctx.layout, a, cores, b, u, index, *flags)
        # One per argument: x, weight, quant, layout, a, cores, b, bias, index, scaling.
        return (
            dx if ctx.need_dx else None,
            None,
            no_grads,
            None,
            None,
            dcores if ctx.need_dcores else None,
            *(None,) * 4,
        )

    return backward


define("linear_rows", (_FORWARD, _BACKWARD), (_forward_fake, _backward_fake), derivative, save)
