"""The thin products before the extended GEMM: u = x Aᵀ, v = s·u Rᵀ forward; t = dy B, w = s·t R backward.

x (dy) is read once, for all members of a group. A rank is covered by one or two powers of two (96 = 64 + 32), so that
little of the work is padding. Splits of the reduction depend only on the shape; the last program of a row block to
finish adds the fp32 sums of all splits in order, rounds them to x's dtype and multiplies by R.

Arguments of `prep_forward` and `prep_backward`. A plural name is a tuple with one entry per member, and so is a stride
marked *; strides are of rows, in elements, and the last dimension is contiguous.

             forward                                   backward
  inputs     x [M, K]                                  dys: dy_i [M, K_i]
             factors: A_i [R, K]                       factors: B_i [K_i, R]
             cores: R_i [R, R], contiguous             cores: likewise
  outputs    us: u_i [M, R], contiguous                t: t_i [M, R_PADDED], side by side
             v: v_i [M, R_PADDED], side by side        w: w_i likewise, with t's strides, if NEED_DX
  workspace  partial: fp32 sums of each split, used if SPLIT
             counters: int32, one per row block (backward: and member), zero between launches; splits: how many
  sizes      M, K                                      M, Ks: K_i
  strides    stride_x, stride_factor*, stride_v        stride_dy*, stride_factor*, stride_w (of t, too)
  scalars    scales: s_i; of dropout: seeds, one per   scales
             member, and threshold
  flags      DROPOUT: mask x                           NEED_DX: w is wanted
             EVEN_R: R = R_PADDED; EVEN_K: every K is a multiple of BLOCK_K; together: no load of a factor is masked
             WIDE: offsets need 64 bits
             PRECISION: of products with x (dy), CORE_PRECISION: of those with R_i, "tf32" or "ieee"
  4 bits     weight, out, ELEMENTS, STORAGE, BLOCK_BYTES: a weight that programs from prep_programs on dequantize, see
             dequantize_4bit; all None without one. One launch serves both: neither reads what the other writes.
  ranks      R; R_BLOCKS: the powers of two that cover it; R_PADDED: their sum
  blocks     BLOCK_M x BLOCK_K of x per step; BLOCK_J: columns of v (w) per step of the product with R_i
             SPLIT: `splits` programs share a row block's reduction
             OVERLAPPED: the next launch may begin before this one has ended, see extended_gemm and tma_gemm
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compat.triton import may_overlap
from .block_sizes import cdiv, prep_splits, rank_blocks
from .dequantize_4bit import dequantize_bytes, storage_of
from .device_functions import gdc_launch_dependents, pick
from .launcher import Launch
from .operands import Arguments, Mask, Members, allocate_workspace, core_precision, needs_int64, precision, unit_rows
from .plan import LaunchPlan
from .projection import PrepConstants, block_ranks, project, store_sums, times_core

WITHOUT_WEIGHT = dict.fromkeys(("weight", "out", "ELEMENTS", "prep_programs", "STORAGE", "BLOCK_BYTES"))


@triton.jit(do_not_specialize=["M", "splits", "seeds", "threshold", "prep_programs"])
def prep_forward(
    x, factors, cores,  # inputs
    us, v,  # outputs
    partial, counters, splits,  # workspace
    weight, out, ELEMENTS, prep_programs,  # dequantization
    M, K,  # sizes
    stride_x, stride_factor, stride_v,  # strides
    scales, seeds, threshold,  # scalars
    # flags
    DROPOUT: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    R: tl.constexpr, R_BLOCKS: tl.constexpr, R_PADDED: tl.constexpr,  # ranks
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAPPED: tl.constexpr, STORAGE: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """u_i = x A_iᵀ and v_i = s_i·u_i R_iᵀ of all members. Grid: `splits` programs per row block."""
    pid = tl.program_id(0)
    if prep_programs is not None:
        if pid >= prep_programs:
            dequantize_bytes(pid - prep_programs, weight, out, ELEMENTS, storage_of(STORAGE), BLOCK_BYTES)
            return
    constants: tl.constexpr = PrepConstants(
        DROPOUT, EVEN_R, EVEN_K, PRECISION, CORE_PRECISION, R, R_BLOCKS, R_PADDED, BLOCK_M, BLOCK_K, BLOCK_J, SPLIT
    )
    if OVERLAPPED:
        gdc_launch_dependents()
    row = pid // splits
    split = pid - row * splits
    rm = row * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rm < M
    # clamped, as in extended_gemm
    m = tl.max_contiguous(tl.multiple_of(tl.where(row_mask, rm, 0), BLOCK_M), BLOCK_M)
    if WIDE:
        m, rm = m.to(tl.int64), rm.to(tl.int64)
    columns, outputs = (), ()
    for i in tl.static_range(len(us)):
        for j in tl.static_range(len(R_BLOCKS)):
            ranks = block_ranks(R_BLOCKS, j)
            columns, outputs = columns + (factors[i] + ranks * stride_factor[i],), outputs + (us[i] + ranks,)
    k_a_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    reduction = (split * k_a_split, min(split * k_a_split + k_a_split, K), K)
    sums = project(x, m * stride_x, columns, 1, reduction, (seeds, threshold, rm), constants)
    if store_sums(sums, outputs, rm * R, row_mask, (partial, counters, splits, row, split), constants):
        for member in range(len(us)):
            source, target = pick(us, member) + rm * R, v + rm * stride_v + member * R_PADDED
            times_core(source, target, pick(cores, member), pick(scales, member), row_mask, constants, True)


@triton.jit(do_not_specialize=["M", "splits", "prep_programs"])
def prep_backward(
    dys, factors, cores,  # inputs
    t, w,  # outputs
    partial, counters, splits,  # workspace
    weight, out, ELEMENTS, prep_programs,  # dequantization
    M, Ks,  # sizes
    stride_dy, stride_factor, stride_w,  # strides
    scales,  # scalars
    # flags
    NEED_DX: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    R: tl.constexpr, R_BLOCKS: tl.constexpr, R_PADDED: tl.constexpr,  # ranks
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAPPED: tl.constexpr, STORAGE: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """t_i = dy_i B_i and w_i = s_i·t_i R_i, a member per program. Grid: `splits` programs per row block and member."""
    pid = tl.program_id(0)
    if prep_programs is not None:
        if pid >= prep_programs:
            dequantize_bytes(pid - prep_programs, weight, out, ELEMENTS, storage_of(STORAGE), BLOCK_BYTES)
            return
    constants: tl.constexpr = PrepConstants(
        False, EVEN_R, EVEN_K, PRECISION, CORE_PRECISION, R, R_BLOCKS, R_PADDED, BLOCK_M, BLOCK_K, BLOCK_J, SPLIT
    )
    if OVERLAPPED:
        gdc_launch_dependents()
    slot = pid // splits
    split = pid - slot * splits
    row, member = slot // len(factors), slot % len(factors)
    rm = row * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rm < M
    # clamped, as in extended_gemm
    m = tl.max_contiguous(tl.multiple_of(tl.where(row_mask, rm, 0), BLOCK_M), BLOCK_M)
    K, stride_k, factor = pick(Ks, member), pick(stride_factor, member), pick(factors, member)
    if WIDE:
        m, rm, stride_k = m.to(tl.int64), rm.to(tl.int64), stride_k.to(tl.int64)
    offsets = rm * stride_w + member * R_PADDED
    columns, outputs = (), ()
    for j in tl.static_range(len(R_BLOCKS)):
        ranks = block_ranks(R_BLOCKS, j)
        columns, outputs = columns + (factor + ranks,), outputs + (t + ranks,)
    k_a_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    reduction = (split * k_a_split, min(split * k_a_split + k_a_split, K), K)
    dy, row_offsets = pick(dys, member), m * pick(stride_dy, member)
    # the mask is on x, not on dy: the extended GEMM applies it to dx
    sums = project(dy, row_offsets, columns, stride_k, reduction, ((0,), 0, rm), constants)
    if store_sums(sums, outputs, offsets, row_mask, (partial, counters, splits, slot, split), constants):
        if NEED_DX:
            core, scale = pick(cores, member), pick(scales, member)
            times_core(t + offsets, w + offsets, core, scale, row_mask, constants, False)


def forward_call(x: Tensor, members: Members, us: list[Tensor], v: Tensor, plan: LaunchPlan, mask: Mask) -> Launch:
    """u_i and v_i of these members; x is read once for all of them."""
    (M, K), config = x.shape, plan.prep
    factors, row_blocks = tuple(unit_rows(a) for a in members.a), cdiv(M, config.block_m)
    # a program has the sums of all members: one workspace block and one counter for each row block
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
    return Launch(prep_forward, row_blocks * splits, arguments, config.fitted(arguments["EVEN_K"]))


def backward_call(
    dys: Sequence[Tensor], members: Members, t: Tensor, w: Tensor, plan: LaunchPlan, need_dx: bool
) -> Launch:
    """t_i of all members, and w_i if dx is needed."""
    M, config = t.shape[0], plan.prep
    factors, Ks = tuple(unit_rows(b) for b in members.b), tuple(dy.shape[1] for dy in dys)
    slots = cdiv(M, config.block_m) * len(dys)  # each member has its own dy, and so its own counter
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
    return Launch(prep_backward, slots * splits, arguments, config.fitted(arguments["EVEN_K"]))


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
        OVERLAPPED=(plan.path == "tma" or plan.overlaps) and may_overlap(prep_forward),
        **WITHOUT_WEIGHT,
    )
