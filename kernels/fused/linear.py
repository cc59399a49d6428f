"""The adapted linear, forward and backward, of a layer or a group: two launches per direction for any group size.

`fused`: the thin products (prep), then the extended GEMM. `addmm`: prep, then cuBLAS twice, the second onto the first.
`tma`: prep, then the same sums in one launch by TMA, if every operand can have a descriptor, else as `addmm`.
`prepared_linear` makes the same calls from launches that it has prepared.

With an R for each row, another kernel computes v_i = s·u_i R_kᵀ (w_i backward) after the thin products. Later launches
read v, whatever its source; the R that is passed to the thin products' kernels is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import extended_gemm, low_rank, tma_gemm
from .block_sizes import prep_members
from .launcher import Launch, launch
from .operands import NO_DROPOUT, Mask, Members, on_device, unit_rows
from .plan import LaunchPlan
from .row_cores import RowProducts


def forward(
    x: Tensor, members: Members, plan: LaunchPlan, mask: Mask = NO_DROPOUT, rows: Sequence[RowProducts] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """y_i = x W_iᵀ + s_i·u_i R_iᵀ B_iᵀ + bias_i [M, m_i] and u_i = x A_iᵀ [M, r] of x [M, n], contiguous in its rows.

    With dropout, s_i must include the factor 1 / (1 - p). rows: the rows' R's, for each member.
    """
    M = x.shape[0]
    us = [x.new_empty((M, members.r)) for _ in members.a]
    if M == 0:
        return [x.new_empty((0, b.shape[0])) for b in members.b], us
    v = x.new_empty((M, members.width * len(us)))
    with on_device(x):
        for call in prep_calls(x, members, us, v, plan, mask):
            launch(call)
        for i, of_rows in enumerate(rows):
            of_rows.times(us[i], True, v[:, i * members.width : (i + 1) * members.width])
        return after_prep(x, members, v, plan), us


def prep_calls(x: Tensor, members: Members, us: list[Tensor], v: Tensor, plan: LaunchPlan, mask: Mask) -> list[Launch]:
    """u_i and v_i: one call, unless the group's ranks do not fit the registers."""
    step = prep_members(members.r, len(members.a))
    some = [slice(i, i + step) for i in range(0, len(us), step)]
    vs = [v[:, part.start * members.width :] for part in some]
    return [
        low_rank.forward_call(x, members.select(part), us[part], v_part, plan, mask.select(part))
        for part, v_part in zip(some, vs, strict=True)
    ]


def after_prep(x: Tensor, members: Members, v: Tensor, plan: LaunchPlan) -> list[Tensor]:
    """y_i = x W_iᵀ + v_i B_iᵀ + bias_i."""
    if plan.path != "addmm":
        ys = [x.new_empty((x.shape[0], b.shape[0])) for b in members.b]
        call = output_call(x, members, v, ys, plan)
        if call is not None:
            launch(call)
            return ys
        del ys  # before others are allocated
    return by_addmm(x, members, v)


def output_call(x: Tensor, members: Members, v: Tensor, ys: list[Tensor], plan: LaunchPlan) -> Launch | None:
    """The launch that computes all y_i from x and v, or None if cuBLAS does."""
    if is_fused(plan, members):
        return extended_gemm.forward_call(x, members, v, ys, plan)
    vs = _parts(v, members)
    if plan.path != "tma" or not tma_gemm.has_descriptors((x, *members.weights, *vs, *members.b, *ys)):
        return None
    operands = zip(members.weights, vs, members.b, strict=True)
    pairs = [[(x, weight), (one, b)] for weight, one, b in operands if weight is not None]
    return tma_gemm.call_of(pairs, ys, members.biases, plan.gemm, True, 1)


def by_addmm(x: Tensor, members: Members, v: Tensor) -> list[Tensor]:
    """y_i by cuBLAS: the adapter's product first; the base GEMM accumulates onto it."""
    vs = _parts(v, members)
    return [_addmm(x, *operands) for operands in zip(vs, members.weights, members.b, members.biases, strict=True)]


def _parts(v: Tensor, members: Members) -> list[Tensor]:
    """Each member's v_i (w_i backward) without its padding."""
    return [v[:, i * members.width : i * members.width + members.r] for i in range(len(members.a))]


def backward(
    dys: Sequence[Tensor],
    members: Members,
    us: Sequence[Tensor],
    plan: LaunchPlan,
    need_dx: bool,
    need_dcore: bool,
    mask: Mask = NO_DROPOUT,
    rows: Sequence[RowProducts] = (),
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = Σ_i dy_i W_i + s_i·dy_i B_i R_i A_i [M, n] and dR_i = s_i·(dy_i B_i)ᵀ u_i [r, r], for dy_i [M, m_i].

    With `rows`, dR_i is [K, r, r], each over its own rows.
    """
    M = dys[0].shape[0]
    dys = [unit_rows(dy) for dy in dys]
    if M == 0:
        cores = [of_rows.cores for of_rows in rows] or members.cores
        dcores = [core.new_zeros(core.shape) for core in cores] if need_dcore else []
        return empty_dx(dys, members) if need_dx else None, dcores
    dcores = [core.new_empty(core.shape) for core in members.cores] if need_dcore and not rows else []
    dx: Tensor | None = None
    t = dys[0].new_empty((M, members.width * len(dys)))
    w = torch.empty_like(t) if need_dx else t  # a dummy: without NEED_DX nothing is stored in it
    with on_device(t):
        launch(low_rank.backward_call(dys, members, t, w, plan, need_dx))
        ts = [t[:, i * members.width : i * members.width + members.r] for i in range(len(rows))]
        if need_dx:
            for i, of_rows in enumerate(rows):
                of_rows.times(ts[i], False, w[:, i * members.width : (i + 1) * members.width])
            dx = after_prep_backward(dys, members, us, (t, w), dcores, plan, mask)
        elif dcores:
            launch(extended_gemm.backward_call(dys, members, us, t, w, None, dcores, plan, mask))
        if rows and need_dcore:
            dcores = [of_rows.gradients(t_i, u) for of_rows, t_i, u in zip(rows, ts, us, strict=True)]
    return dx, dcores


def after_prep_backward(
    dys: Sequence[Tensor],
    members: Members,
    us: Sequence[Tensor],
    thin: tuple[Tensor, Tensor],
    dcores: list[Tensor],
    plan: LaunchPlan,
    mask: Mask,
) -> Tensor:
    """dx = Σ_i dy_i W_i + w_i A_i, and dR_i into `dcores`, if they are wanted: one launch, dR's programs first.

    thin: t and w.
    """
    (t, w), dx, fused = thin, empty_dx(dys, members), is_fused(plan, members, mask)
    adds = mask.dropout > 0.0 and not fused
    if not fused:
        unmasked = None if adds else w
        call = tma_backward_call(dys, members, unmasked, dx, plan)
        if call is None:
            addmm_backward(dys, members, unmasked, dx)
        else:
            launch(call)
    if fused or adds or dcores:
        written = dx if fused or adds else None
        launch(extended_gemm.backward_call(dys, members, us, t, w, written, dcores, plan, mask, adds))
    return dx


def tma_backward_call(
    dys: Sequence[Tensor], members: Members, w: Tensor | None, dx: Tensor, plan: LaunchPlan
) -> Launch | None:
    """dx = Σ_i dy_i W_i + w_i A_i by TMA, or None if cuBLAS computes it; without w, the base's part alone."""
    base, adapter = _terms(dys, members, w)
    terms = [*base, *adapter]
    if plan.path != "tma" or not tma_gemm.has_descriptors((dx, *(one for pair in terms for one in pair))):
        return None
    return tma_gemm.call_of([terms], [dx], [None], plan.gemm, False, len(base))


def addmm_backward(dys: Sequence[Tensor], members: Members, w: Tensor | None, dx: Tensor) -> None:
    """dx = Σ_i w_i A_i + dy_i W_i by cuBLAS, in place; without w, the base's part alone."""
    base, adapter = _terms(dys, members, w)
    if w is not None and members.r == members.width and len(adapter) > 1:
        adapter = [(w, torch.cat(list(members.a)))]  # to write dx once for all: a copy of A is far smaller
    first, *others = [*adapter, *base]
    torch.mm(*first, out=dx)
    for left, right in others:
        dx.addmm_(left, right)


def _terms(
    dys: Sequence[Tensor], members: Members, w: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The factors of dx's terms: of the base, and of the adapters."""
    base = [(dy, weight) for dy, weight in zip(dys, members.weights, strict=True) if weight is not None]
    return base, [] if w is None else list(zip(_parts(w, members), members.a, strict=True))


def empty_dx(dys: Sequence[Tensor], members: Members) -> Tensor:
    """dx [M, n], not yet written."""
    return dys[0].new_empty((dys[0].shape[0], members.a[0].shape[1]))


def is_fused(plan: LaunchPlan, members: Members, mask: Mask = NO_DROPOUT) -> bool:
    """True if the extended GEMM computes y or dx; nothing else can compute the masked dx of a layer without a base."""
    if mask.dropout > 0.0 and members.weights[0] is None:
        return True
    # a weight that is stored transposed would have to be copied; cuBLAS reads it in place
    return plan.path == "fused" and all(w is None or w.stride(-1) == 1 for w in members.weights)


def _addmm(x: Tensor, v: Tensor, weight: Tensor | None, b: Tensor, bias: Tensor | None) -> Tensor:
    y = v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
    return y if weight is None else y.addmm_(x, weight.t())
