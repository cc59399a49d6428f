"""The adapted linear as a torch op: schema, fake kernel and autograd formula, shared by all backends.

    y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias        x [..., n], W [m, n], A [r, n], R [r, r], B [m, r], bias [m]

With M rows in x, the op returns y [..., m] and u = x Aᵀ [M, r], which its backward takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .registry import define

_FORWARD = (
    "(Tensor x, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor? bias, float scaling, float dropout, "
    "Tensor? seed) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor u, float scaling, float dropout, "
    "Tensor? seed, bool need_dx, bool need_dcore) -> (Tensor, Tensor)"
)


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
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
    weight: Tensor | None,
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


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save u [M, r] for backward, never x [M, n]: dR = s·tᵀ u with t = dy B, and dx depends on neither."""
    _, weight, a, core, b, _, scaling, dropout, seed = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)  # dy may be None; u's gradient always is, and no zeros are allocated for it
    need_dcore = ctx.needs_input_grad[3]
    # An empty u in place of one that is not needed frees its memory and keeps the number of saved tensors fixed.
    ctx.save_for_backward(weight, a, core, b, u if need_dcore else u.new_empty((0, a.shape[0])), seed)
    ctx.scaling, ctx.dropout = scaling, dropout


def derivative(op: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The function that autograd calls, which calls a backend's backward op."""

    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        need_dx, need_dcore = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        if dy is None or not (need_dx or need_dcore):
            return (None,) * 9
        weight, a, core, b, u, seed = ctx.saved_tensors
        dx, dcore = op(dy, weight, a, core, b, u, ctx.scaling, ctx.dropout, seed, need_dx, need_dcore)
        # One per argument of the forward op: x, weight, a, core, b, bias, scaling, dropout, seed.
        return (dx if need_dx else None, None, None, dcore if need_dcore else None, *(None,) * 5)

    return backward


define("linear", (_FORWARD, _BACKWARD), (_forward_fake, _backward_fake), derivative, save)
