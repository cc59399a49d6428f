"""Adapted linears with one R per row: the kernels of one R, with another kernel for v_i = s·u_i R_kᵀ in between.

What follows the thin products reads v (backward: w) and does not know where it comes from: the extended GEMM runs as it
is. The R that the thin products' kernels are given is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import low_rank_launch, row_cores_launch
from .launcher import launch
from .linear import NO_DROPOUT, after_prep, after_prep_backward, empty_dx, prep_calls
from .operands import Members, on_device, unit_rows
from .plan import LaunchPlan


class RowCores(NamedTuple):
    """R's [K, r, r], the place of each row's R among them or -1 (int64 on the CPU), and s."""

    cores: Tensor
    index: Tensor
    scale: float

    def times(self, left: Tensor, transposed: bool, out: Tensor) -> Tensor:
        """out = s·left_i R_kᵀ, or R_k; see `row_cores_launch.times_cores`."""
        return row_cores_launch.times_cores(left, self.cores, self.index, self.scale, transposed, out)

    def gradients(self, t: Tensor, u: Tensor) -> Tensor:
        """dR_k [K, r, r]."""
        return row_cores_launch.core_gradients(t, u, self.cores, self.index, self.scale)


def forward(
    x: Tensor, members: Members, biases: Sequence[Tensor | None], rows: Sequence[RowCores], plan: LaunchPlan
) -> tuple[list[Tensor], list[Tensor]]:
    """y_j = x W_jᵀ + v_j B_jᵀ + bias_j [M, m_j] with v_ji = s_j·u_ji R_jkᵀ of each row i, and u_j = x A_jᵀ [M, r]."""
    M, width = x.shape[0], members.width
    us = [x.new_empty((M, members.r)) for _ in rows]
    if M == 0:
        return [x.new_empty((0, b.shape[0])) for b in members.b], us
    v = x.new_empty((M, width * len(us)))
    with on_device(x):
        for call in prep_calls(x, members, us, v, plan, NO_DROPOUT):
            launch(call)
        for of_rows, u, out in zip(rows, us, v.split(width, 1), strict=True):
            of_rows.times(u, True, out)
        return after_prep(x, members, biases, v, plan), us


def backward(
    dys: Sequence[Tensor],
    members: Members,
    us: Sequence[Tensor],
    rows: Sequence[RowCores],
    plan: LaunchPlan,
    need_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = Σ_j dy_j W_j + w_j A_j [M, n] with w_ji = s_j·t_ji R_jk, and t_j = dy_j B_j [M, r]."""
    M, r, width = dys[0].shape[0], members.r, members.width
    dys = [unit_rows(dy) for dy in dys]
    if M == 0:
        return empty_dx(dys, members) if need_dx else None, [dy.new_empty((0, r)) for dy in dys]
    t = dys[0].new_empty((M, width * len(dys)))
    w = torch.empty_like(t) if need_dx else t  # a dummy, as in `linear.backward`
    ts = [part[:, :r] for part in t.split(width, 1)]
    dx = None
    with on_device(t):
        launch(low_rank_launch.backward_call(dys, members, t, w, plan, need_dx))
        if need_dx:
            for of_rows, t_j, out in zip(rows, ts, w.split(width, 1), strict=True):
                of_rows.times(t_j, False, out)
            dx = after_prep_backward(dys, members, us, (t, w), [], plan, NO_DROPOUT)
    return dx, ts
