"""The adapted linear with an R for each row on the fused kernels.

Over a quantized weight the adapter is added to what the kernels compute with R = 0.
"""

from __future__ import annotations

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
    rows, members = rows_of(x), resolved(members_of(weight, a, none, b, 1.0))
    given = None if bias is None else bias.resolve_neg()
    y, u = kernels.forward(rows, members, given, of_rows, plan_of("forward", rows, members.b, members.a[0]))
    return shaped(y, x), u


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
    members = resolved(members_of(weight, a, none, b, 1.0))
    dx: Tensor | None = None
    if quant:
        t = rows @ b
        if need_dx:
            flags = 1.0, 0.0, None, True, False
            dx, _ = linear_quantized.linear_backward(rows, quant, layout, a, none, b, u[:0], *flags)
            w = of_rows.times(t, False, t.new_empty((len(t), members.width)))
            dx = dx.addmm_(w[:, : t.shape[1]], a)
    else:
        plan = plan_of("backward", rows, members.b, members.a[0])
        dx, t = kernels.backward(rows, members, u, of_rows, plan, need_dx)
    dcores = of_rows.gradients(t, u) if need_dcores else cores.new_empty((0,))
    return dy.new_empty((0,)) if dx is None else shaped(dx, dy), dcores


def _no_core(cores: Tensor) -> Tensor:
    """R = 0 in fp32, for kernels whose own product with R is not used."""
    return cores.new_zeros(cores.shape[1:], dtype=torch.float32)


def register() -> None:
    """Register for CUDA; on the CPU, for an explicit backend under Triton's interpreter."""
    register_pairs({"linear_rows": (forward, eager.forward), "linear_rows_backward": (backward, eager.backward)})
