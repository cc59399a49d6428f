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

from .linear_group import backward_fake, forward_fake, of_used_members, save_members
from .registry import define

_FORWARD = (
    "(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] biases, Tensor index, "
    "float[] scalings) -> Tensor[]"
)
_BACKWARD = (
    "(Tensor[] dys, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] us, float[] scalings, "
    "Tensor index, bool need_dx, bool need_dcores) -> Tensor[]"
)


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


define("linear_rows_group", (_FORWARD, _BACKWARD), (forward_fake, backward_fake), _derivative, save)
