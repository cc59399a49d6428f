"""The adapted linear with an R for each row on the fused kernels.

Over a quantized weight the adapter is added to what the kernels compute with R = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.linear_rows import check_index
from ..eager import linear_rows as eager
from ..eager.linear import shaped
from . import linear_quantized
from .linear import members_of, plan_of, register_pairs, resolved, rows_of


def forward(
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
    """y = x Wᵀ + s·u_i R_kᵀ Bᵀ + bias [..., out] and u = x Aᵀ [M, r]."""
    check_index(index, len(cores))
    from lorasb.kernels import linear_rows as kernels

    none, of_rows = _no_core(cores), kernels.RowCores(cores, index, scaling)
    if quant:
        y, u = linear_quantized.linear(x, quant, layout, a, none, b, bias, 1.0, 0.0, None)
        v = of_rows.times(u, True, u.new_empty((len(u), members_of(None, a, none, b, 1.0).width)))
        return y.add_(shaped(v[:, : u.shape[1]] @ b.t(), y)), u
    y, u = _forward(x, members_of(weight, a, none, b, 1.0), [bias], [of_rows])
    return y, u


def backward(
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
    """dx = dy W + (s·t_i R_k) A with t = dy B, and dR_k; a gradient that is not needed is an empty tensor."""
    from lorasb.kernels import linear_rows as kernels

    none, rows, of_rows = _no_core(cores), rows_of(dy), kernels.RowCores(cores, index, scaling)
    members = members_of(weight, a, none, b, 1.0)
    if not quant:
        dx, dcores = _backward([dy], members, [u], [of_rows], need_dx, need_dcores)
        return dx, dcores
    t, dx = rows @ b, dy.new_empty((0,))
    if need_dx:
        flags = 1.0, 0.0, None, True, False
        dx, _ = linear_quantized.linear_backward(rows, quant, layout, a, none, b, u[:0], *flags)
        w = of_rows.times(t, False, t.new_empty((len(t), members.width)))
        dx = shaped(dx.addmm_(w[:, : t.shape[1]], a), dy)
    return dx, of_rows.gradients(t, u) if need_dcores else cores.new_empty((0,))


def group_forward(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    index: Tensor,
    scalings: list[float],
) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j [M, r]: one pass over x and one grouped extended GEMM."""
    check_index(index, min(map(len, cores)))
    members, rows = _group_of(weights, a, cores, b, index, scalings)
    return _forward(x, members, list(biases) or [None] * len(a), rows)


def group_backward(
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
    """dx = Σ_j dy_j W_j + w_j A_j, written once, then the dR_jk."""
    members, rows = _group_of(weights, a, cores, b, index, scalings)
    return _backward(dys, members, us, rows, need_dx, need_dcores)


def _group_of(
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    index: Tensor,
    scalings: list[float],
) -> tuple[Any, list[Any]]:
    """The layers with R = 0, and their R's by row."""
    from lorasb.kernels import linear_rows as kernels
    from lorasb.kernels.operands import Members

    members = Members(weights, a, [_no_core(stack) for stack in cores], b, [1.0] * len(a))
    rows = [kernels.RowCores(stack, index, float(s)) for stack, s in zip(cores, scalings, strict=True)]
    return members, rows


def _forward(x: Tensor, members: Any, biases: list[Any], of_rows: list[Any]) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j."""
    from lorasb.kernels import linear_rows as kernels

    rows, members = rows_of(x), resolved(members)
    plan = plan_of("forward", rows, members.b, members.a[0])
    ys, us = kernels.forward(rows, members, [None if b is None else b.resolve_neg() for b in biases], of_rows, plan)
    return [*(shaped(y, x) for y in ys), *us]


def _backward(
    dys: list[Tensor], members: Any, us: list[Tensor], of_rows: list[Any], need_dx: bool, need_dcores: bool
) -> list[Tensor]:
    """dx, then the dR_jk; a gradient that is not needed is an empty tensor."""
    from lorasb.kernels import linear_rows as kernels

    rows, members = [rows_of(dy) for dy in dys], resolved(members)
    plan = plan_of("backward", rows[0], members.b, members.a[0])
    dx, ts = kernels.backward(rows, members, us, of_rows, plan, need_dx)
    dcores = [
        one.gradients(t, u) if need_dcores else one.cores.new_empty((0,))
        for one, t, u in zip(of_rows, ts, us, strict=True)
    ]
    return [dys[0].new_empty((0,)) if dx is None else shaped(dx, dys[0]), *dcores]


def _no_core(cores: Tensor) -> Tensor:
    """R = 0 in fp32, for kernels whose own product with R is not used."""
    return cores.new_zeros(cores.shape[1:], dtype=torch.float32)


def register() -> None:
    """Register for CUDA; on the CPU, for an explicit backend under Triton's interpreter."""
    kernels: tuple[Callable[..., Any], ...] = (forward, backward, group_forward, group_backward)
    register_pairs({op: (kernel, plain) for kernel, (op, plain) in zip(kernels, eager.KERNELS, strict=True)})
