"""Adapted linears that read the same x, as one torch op: one pass over x in forward, one write of dx in backward.

    y_i = x W_iᵀ + s_i·x A_iᵀ R_iᵀ B_iᵀ + bias_i

All members have the same rank, dtype and dropout, and either all of them a bias or none. With dropout each has a seed
and a mask: `seeds` [members], int64, on the CPU. The op returns the y_i [..., m_i], then the u_i = x A_iᵀ
[M, r].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .registry import define

_FORWARD = (
    "(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] biases, float[] scalings, "
    "float dropout, Tensor? seeds) -> Tensor[]"
)
_BACKWARD = (
    "(Tensor[] dys, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] us, float[] scalings, "
    "float dropout, Tensor? seeds, bool need_dx, bool need_dcore) -> Tensor[]"
)


def forward_fake(
    x: Tensor, weights: list[Tensor], a: list[Tensor], cores: list[Tensor], b: list[Tensor], *_: Any
) -> list[Tensor]:
    """Empty results of the op, and of one with other arguments after these."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    ys = [x.new_empty((*x.shape[:-1], factor.shape[0])) for factor in b]
    return ys + [x.new_empty((rows, factor.shape[0])) for factor in a]


def backward_fake(
    dys: list[Tensor], weights: list[Tensor], a: list[Tensor], cores: list[Tensor], *others: Any
) -> list[Tensor]:
    """Empty gradients, the last two arguments being whether each kind is needed."""
    *_, need_dx, need_dcores = others
    dx = dys[0].new_empty((*dys[0].shape[:-1], a[0].shape[1]) if need_dx else (0,))
    return [dx, *(core.new_empty(core.shape if need_dcores else (0,)) for core in cores)]


def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Save the u_i [M, r] for backward, and never x."""
    *operands, scalings, ctx.dropout, seeds = inputs
    save_members(ctx, operands, output, scalings, seeds)


def save_members(ctx: Any, operands: Sequence[Any], output: list[Tensor], scalings: list[float], last: Any) -> None:
    """Save all weights, A, cores, B and u, and `last`; `operands` are x, those lists, and biases."""
    x, weights, a, cores, b, biases = operands
    us = output[len(a) :]
    ctx.mark_non_differentiable(*us)
    ctx.set_materialize_grads(False)
    # Not ctx.needs_input_grad, which has one entry for each list.
    ctx.need_dx, ctx.need_dcores = x.requires_grad, [core.requires_grad for core in cores]
    saved_us = us if any(ctx.need_dcores) else [u.new_empty((0, u.shape[1])) for u in us]
    ctx.save_for_backward(*weights, *a, *cores, *b, *saved_us, last)
    ctx.scalings, ctx.biases = list(scalings), len(biases)


def gradients(op: Callable[..., Any], ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Any]]:
    """dx and the dR_i, from the gradients of the y_i."""
    *saved, seeds = ctx.saved_tensors

    def call(members: list[int], *lists: Any) -> Any:
        chosen = None if seeds is None else seeds[members]
        return op(*lists, ctx.dropout, chosen, ctx.need_dx, any(ctx.need_dcores))

    return of_used_members(ctx, grads, saved, call)


def of_used_members(
    ctx: Any, grads: Sequence[Tensor | None], saved: Sequence[Tensor], call: Callable[..., Any]
) -> tuple[Tensor | None, list[Any]]:
    """dx and the dR_i of a group, some of whose outputs the loss does not use.

    Args:
        ctx: has `scalings`, `need_dx` and `need_dcores`.
        grads: of the y_i, None for one that is not used.
        saved: all weights, A, cores, B and u.
        call: (indices of members, and of them dys, weights, a, cores, b, us, scalings) -> dx, then their dR.
    """
    count = len(ctx.scalings)
    dcores: list[Tensor | None] = [None] * count
    members = [i for i in range(count) if grads[i] is not None]
    if not members or not (ctx.need_dx or any(ctx.need_dcores)):
        return None, dcores
    lists = [[saved[k * count + i] for i in members] for k in range(5)]
    dx, *member_dcores = call(members, [grads[i] for i in members], *lists, [ctx.scalings[i] for i in members])
    for i, dcore in zip(members, member_dcores, strict=True):
        dcores[i] = dcore if ctx.need_dcores[i] else None
    return dx if ctx.need_dx else None, dcores


def _derivative(op: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        dx, dcores = gradients(op, ctx, grads)
        no_grads = [None] * len(dcores)
        return dx, no_grads, no_grads, dcores, no_grads, [None] * ctx.biases, None, None, None

    return backward


define("linear_group", (_FORWARD, _BACKWARD), (forward_fake, backward_fake), _derivative, save)
