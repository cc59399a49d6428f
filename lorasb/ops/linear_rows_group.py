"""Adapted linears that read the same x with an R of their own for each row, as one torch op: `linear_rows` of a group.

    y_ji = x_i W_jᵀ + s_j·x_i A_jᵀ R_jkᵀ B_jᵀ + bias_j    with k = index[i]

Every member j has its own stack of R's, cores_j [K, r, r]; the index is the same for all of them. All have the same
rank and dtype, a dense weight, and either all of them a bias or none. The op returns the y_j [..., m_j], then the
u_j = x A_jᵀ [M, r].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .linear_group import of_used_members, save_members
from .registry import define

_FORWARD = (
    "(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] biases, Tensor index, "
    "float[] scalings) -> Tensor[]"
)
_BACKWARD = (
    "(Tensor[] dys, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] us, float[] scalings, "
    "Tensor index, bool need_dx, bool need_dcores) -> Tensor[]"
)


def _forward_fake(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    index: Tensor,
    scalings: list[float],
) -> list[Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    ys = [x.new_empty((*x.shape[:-1], factor.shape[0])) for factor in b]
    return ys + [x.new_empty((rows, factor.shape[0])) for factor in a]


def _backward_fake(
    dys: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    us: list[Tensor],
    scalings: list[float],
    index: Tensor,
    need_dx: bool,
    need_dcores: bool,
) -> list[Tensor]:
    dx = dys[0].new_empty((*dys[0].shape[:-1], a[0].shape[1]) if need_dx else (0,))
    return [dx, *(stack.new_empty(stack.shape if need_dcores else (0,)) for stack in cores)]


def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Save the u_j [M, r] and the index, and never x."""
    *operands, index, scalings = inputs
    save_members(ctx, operands, output, scalings, index)


def _derivative(op: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        *saved, index = ctx.saved_tensors

        def call(members: list[int], *lists: Any) -> Any:
            return op(*lists, index, ctx.need_dx, any(ctx.need_dcores))

        dx, dcores = of_used_members(ctx, grads, saved, call)
        no_grads = [None] * len(dcores)
        return dx, no_grads, no_grads, dcores, no_grads, [None] * ctx.biases, None, None

    return backward


define("linear_rows_group", (_FORWARD, _BACKWARD), (_forward_fake, _backward_fake), _derivative, save)
