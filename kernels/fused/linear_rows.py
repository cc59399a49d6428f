"""The adapted linear with an R for each row: the kernels of one R, and between them v_i = s·u_i R_kᵀ of its own.

What follows the thin products reads v (backward: w) and does not know where it comes from: the extended GEMM runs as it
is. The R that the thin products' kernels are given is not used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import low_rank_launch, row_cores_launch
from .launcher import launch
from .linear import NO_DROPOUT, after_prep, after_prep_backward, empty_dx, prep_calls
from .operands import Members, on_device, unit_rows
from .plan import Plan


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


def forward(x: Tensor, members: Members, bias: Tensor | None, rows: RowCores, plan: Plan) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + v Bᵀ + bias [M, m] with v_i = s·u_i R_kᵀ, and u = x Aᵀ [M, r]; one member."""
    M = x.shape[0]
    u = x.new_empty((M, members.r))
    if M == 0:
        return x.new_empty((0, members.b[0].shape[0])), u
    v = x.new_empty((M, members.width))
    with on_device(x):
        for call in prep_calls(x, members, [u], v, plan, NO_DROPOUT):
            launch(call)
        rows.times(u, True, v)
        (y,) = after_prep(x, members, [bias], v, plan)
    return y, u


def backward(
    dy: Tensor, members: Members, u: Tensor, rows: RowCores, plan: Plan, need_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """dx = dy W + w A [M, n] with w_i = s·t_i R_k, and t = dy B [M, r]; one member."""
    M, r = dy.shape[0], members.r
    dy = unit_rows(dy)
    if M == 0:
        return empty_dx([dy], members) if need_dx else None, dy.new_empty((0, r))
    t = dy.new_empty((M, members.width))
    w = torch.empty_like(t) if need_dx else t  # a dummy, as in `linear.backward`
    dx = None
    with on_device(t):
        launch(low_rank_launch.backward_call([dy], members, t, w, plan, need_dx))
        if need_dx:
            rows.times(t[:, :r], False, w)
            dx = after_prep_backward([dy], members, [u], t, w, [], plan, NO_DROPOUT)
    return dx, t[:, :r]
