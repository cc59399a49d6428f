"""The adapted linear with an R for each row on the fused kernels; the product with R's themselves is torch's.

Over a quantized weight the adapter is added to what the kernels compute with R = 0.
"""

from __future__ import annotations

from functools import partial

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
    none = cores.new_zeros(cores.shape[1:])
    if quant:
        y, u = linear_quantized.linear(x, quant, layout, a, none, b, bias, 1.0, 0.0, None)
        return y.add_(shaped(eager.times_cores(u, cores, index, scaling, True) @ b.t(), y)), u
    from lorasb.kernels import linear_rows as kernels

    rows, members = rows_of(x), resolved(members_of(weight, a, none, b, 1.0))
    times = partial(eager.times_cores, cores=cores, index=index, scale=scaling, transposed=True)
    given = None if bias is None else bias.resolve_neg()
    y, u = kernels.forward(rows, members, given, times, plan_of("forward", rows, members.b, members.a[0]))
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
    none, rows = cores.new_zeros(cores.shape[1:]), rows_of(dy)
    times = partial(eager.times_cores, cores=cores, index=index, scale=scaling, transposed=False)
    dx: Tensor | None = None
    if quant:
        t = rows @ b
        if need_dx:
            flags = 1.0, 0.0, None, True, False
            dx, _ = linear_quantized.linear_backward(rows, quant, layout, a, none, b, u[:0], *flags)
            dx = dx.addmm_(times(t), a)
    else:
        from lorasb.kernels import linear_rows as kernels

        members = resolved(members_of(weight, a, none, b, 1.0))
        plan = plan_of("backward", rows, members.b, members.a[0])
        dx, t = kernels.backward(rows, members, u, times, plan, need_dx)
    dcores = eager.core_gradients(t, u, cores, index, scaling) if need_dcores else cores.new_empty((0,))
    return dy.new_empty((0,)) if dx is None else shaped(dx, dy), dcores


def register() -> None:
    """Register for CUDA; on the CPU, for an explicit backend under Triton's interpreter."""
    register_pairs({"linear_rows": (forward, eager.forward), "linear_rows_backward": (backward, eager.backward)})
