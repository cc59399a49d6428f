"""From tensors to calls of `prep_forward` and `prep_backward`: grids, workspaces, strides and flags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compat.triton import has_tma, is_compiled
from .block_sizes import cdiv, prep_splits, rank_blocks
from .launcher import Launch
from .low_rank import prep_backward, prep_forward
from .operands import Arguments, Mask, Members, allocate_workspace, core_precision, needs_int64, precision, unit_rows
from .plan import LaunchPlan

WITHOUT_WEIGHT = dict.fromkeys(("weight", "out", "ELEMENTS", "prep_programs", "STORAGE", "BLOCK_BYTES"))


def forward_call(x: Tensor, members: Members, us: list[Tensor], v: Tensor, plan: LaunchPlan, mask: Mask) -> Launch:
    """u_i and v_i of these members, which share one reading of x."""
    (M, K), config = x.shape, plan.prep
    factors, row_blocks = tuple(unit_rows(a) for a in members.a), cdiv(M, config.block_m)
    # a program holds the sums of all members: one workspace block and one counter for each row block
    splits = prep_splits(row_blocks, cdiv(K, config.block_k))
    size = row_blocks * splits * config.block_m * members.width * len(us)
    partial, counters = allocate_workspace(x, size, row_blocks, splits)
    arguments = dict(
        x=x,
        factors=factors,
        us=tuple(us),
        v=v,
        partial=partial,
        counters=counters,
        M=M,
        K=K,
        stride_x=x.stride(0),
        stride_factor=tuple(a.stride(0) for a in factors),
        stride_v=v.stride(0),
        **mask.arguments,
        EVEN_K=K % config.block_k == 0,
        WIDE=needs_int64(x, v, *factors),
        splits=splits,
        SPLIT=splits > 1,
    )
    arguments |= _common_arguments(members, plan, x.dtype)
    return Launch(prep_forward, row_blocks * splits, arguments, config)


def backward_call(
    dys: Sequence[Tensor], members: Members, t: Tensor, w: Tensor, plan: LaunchPlan, need_dx: bool
) -> Launch:
    """t_i of all members, and w_i if dx is needed."""
    M, config = t.shape[0], plan.prep
    factors, Ks = tuple(unit_rows(b) for b in members.b), tuple(dy.shape[1] for dy in dys)
    slots = cdiv(M, config.block_m) * len(dys)  # members have dys of their own: one counter for each of them
    splits = prep_splits(slots, cdiv(max(Ks), config.block_k))
    partial, counters = allocate_workspace(t, slots * splits * config.block_m * members.width, slots, splits)
    arguments = dict(
        dys=tuple(dys),
        factors=factors,
        t=t,
        w=w,
        partial=partial,
        counters=counters,
        M=M,
        Ks=Ks,
        stride_dy=tuple(dy.stride(0) for dy in dys),
        stride_factor=tuple(b.stride(0) for b in factors),
        stride_w=w.stride(0),
        NEED_DX=need_dx,
        EVEN_K=all(k % config.block_k == 0 for k in Ks),
        WIDE=needs_int64(t, *dys, *factors),
        splits=splits,
        SPLIT=splits > 1,
    )
    arguments |= _common_arguments(members, plan, t.dtype)
    return Launch(prep_backward, slots * splits, arguments, config)


def _common_arguments(members: Members, plan: LaunchPlan, dtype: torch.dtype) -> Arguments:
    """Cores, flags, ranks and blocks, the same in both directions."""
    width, config = members.width, plan.prep
    return dict(
        cores=tuple(core.contiguous() for core in members.cores),
        scales=tuple(members.scales),
        EVEN_R=members.r == width,
        PRECISION=precision(dtype),
        CORE_PRECISION=core_precision(dtype),
        R=members.r,
        R_BLOCKS=rank_blocks(members.r),
        R_PADDED=width,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_J=32 if width % 32 == 0 else 16,  # has to divide R_PADDED, a multiple of 16
        OVERLAPPED=plan.path == "tma" and has_tma() and is_compiled(prep_forward),
        **WITHOUT_WEIGHT,
    )
