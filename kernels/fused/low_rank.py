"""The thin products before the extended GEMM: u = x Aᵀ, v = s·u Rᵀ forward; t = dy B, w = s·t R backward.

x (dy) is read once, for all members of a group. A rank is covered by one or two powers of two (96 = 64 + 32), so that
little of the work is padding. The reduction is split by the shape alone; the last program of a row block to finish adds
the fp32 sums of all splits in order, rounds them to x's dtype and multiplies by R.

Arguments of `prep_forward` and `prep_backward`. A plural name is a tuple with one entry a member, and so is a stride
marked *; strides are of rows, in elements, and the last dimension is contiguous.

             forward                                   backward
  inputs     x [M, K]                                  dys: dy_i [M, K_i]
             factors: A_i [R, K]                       factors: B_i [K_i, R]
             cores: R_i [R, R], contiguous             cores: likewise
  outputs    us: u_i [M, R], contiguous                t: t_i [M, R_PADDED], side by side
             v: v_i [M, R_PADDED], side by side        w: w_i likewise, with t's strides, if NEED_DX
  workspace  partial: fp32 sums of each split, used if SPLIT
             counters: int32, one a row block (backward: and member), zero between launches; splits: how many
  sizes      M, K                                      M, Ks: K_i
  strides    stride_x, stride_factor*, stride_v        stride_dy*, stride_factor*, stride_w (of t, too)
  scalars    scales: s_i; of dropout: seeds, one a     scales
             member, and threshold
  flags      DROPOUT: mask x                           NEED_DX: w is wanted
             EVEN_R: R = R_PADDED; EVEN_K: every K is a multiple of BLOCK_K; together: no load of a factor is masked
             WIDE: offsets need 64 bits
             PRECISION: of products with x (dy), CORE_PRECISION: of those with R_i, "tf32" or "ieee"
  ranks      R; R_BLOCKS: the powers of two that cover it; R_PADDED: their sum
  blocks     BLOCK_M x BLOCK_K of x a step; BLOCK_J: columns of v (w) a step of the product with R_i
             SPLIT: `splits` programs share a row block's reduction
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import pick
from .projection import PrepBlocks, PrepFlags, Ranks, block_ranks, project, store_sums, times_core


@triton.jit
def forward_rows(
    pid,
    operands,
    workspace,
    sizes,
    strides,
    scales,
    dropout,
    flags,
    ranks,
    blocks,
    DROPOUT: tl.constexpr,
):
    """One program of `prep_forward`; arguments: the kernel's, a tuple a group, in the kernel's order."""
    x, factors, cores, us, v = operands
    partial, counters, splits = workspace
    M, K = sizes
    stride_x, stride_factor, stride_v = strides
    row = pid // splits
    split = pid - row * splits
    rm = row * blocks.BLOCK_M + tl.arange(0, blocks.BLOCK_M)
    row_mask = rm < M
    # clamped, as in extended_gemm
    m = tl.max_contiguous(tl.multiple_of(tl.where(row_mask, rm, 0), blocks.BLOCK_M), blocks.BLOCK_M)
    if flags.WIDE:
        m, rm = m.to(tl.int64), rm.to(tl.int64)
    columns, outputs = (), ()
    for i in tl.static_range(len(us)):
        for j in tl.static_range(len(ranks.R_BLOCKS)):
            columns = columns + (factors[i] + block_ranks(ranks.R_BLOCKS, j) * stride_factor[i],)
            outputs = outputs + (us[i] + block_ranks(ranks.R_BLOCKS, j),)
    k_a_split = tl.cdiv(tl.cdiv(K, blocks.BLOCK_K), splits) * blocks.BLOCK_K
    row_offsets = m * stride_x
    reduction = (split * k_a_split, min(split * k_a_split + k_a_split, K), K)
    sums = project(x, row_offsets, columns, 1, reduction, rm, dropout, flags, ranks, blocks, DROPOUT)
    SIZE: tl.constexpr = blocks.BLOCK_M * ranks.R_PADDED * len(us)
    slot_workspace = (partial + (row * splits).to(tl.int64) * SIZE, counters, splits)
    if store_sums(sums, outputs, rm * ranks.R, row_mask, slot_workspace, row, split, ranks, blocks, SIZE):
        for member in range(len(us)):
            source, target = pick(us, member) + rm * ranks.R, v + rm * stride_v + member * ranks.R_PADDED
            core, scale = pick(cores, member), pick(scales, member)
            times_core(source, target, core, scale, row_mask, ranks, blocks, True, flags.CORE_PRECISION)


@triton.jit(do_not_specialize=["M", "splits", "seeds", "threshold"])
def prep_forward(
    # inputs
    x,
    factors,
    cores,
    # outputs
    us,
    v,
    # workspace
    partial,
    counters,
    splits,
    # sizes
    M,
    K,
    # strides
    stride_x,
    stride_factor,
    stride_v,
    # scalars
    scales,
    seeds,
    threshold,
    # flags
    DROPOUT: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    # ranks
    R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    R_PADDED: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """u_i = x A_iᵀ and v_i = s_i·u_i R_iᵀ of all members. Grid: `splits` programs a row block."""
    forward_rows(
        tl.program_id(0),
        (x, factors, cores, us, v),
        (partial, counters, splits),
        (M, K),
        (stride_x, stride_factor, stride_v),
        scales,
        (seeds, threshold),
        PrepFlags(EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION),
        Ranks(R, R_BLOCKS, R_PADDED),
        PrepBlocks(BLOCK_M, BLOCK_K, BLOCK_J, SPLIT),
        DROPOUT,
    )


@triton.jit
def backward_rows(
    pid,
    operands,
    workspace,
    sizes,
    strides,
    scales,
    flags,
    ranks,
    blocks,
    NEED_DX: tl.constexpr,
):
    """One program of `prep_backward`; arguments: the kernel's, a tuple a group, in the kernel's order."""
    dys, factors, cores, t, w = operands
    partial, counters, splits = workspace
    M, Ks = sizes
    stride_dy, stride_factor, stride_w = strides
    slot = pid // splits
    split = pid - slot * splits
    row, member = slot // len(factors), slot % len(factors)
    rm = row * blocks.BLOCK_M + tl.arange(0, blocks.BLOCK_M)
    row_mask = rm < M
    # clamped, as in extended_gemm
    m = tl.max_contiguous(tl.multiple_of(tl.where(row_mask, rm, 0), blocks.BLOCK_M), blocks.BLOCK_M)
    K, stride_k, factor = pick(Ks, member), pick(stride_factor, member), pick(factors, member)
    if flags.WIDE:
        m, rm, stride_k = m.to(tl.int64), rm.to(tl.int64), stride_k.to(tl.int64)
    offsets = rm * stride_w + member * ranks.R_PADDED
    columns, outputs = (), ()
    for j in tl.static_range(len(ranks.R_BLOCKS)):
        columns, outputs = (
            columns + (factor + block_ranks(ranks.R_BLOCKS, j),),
            outputs + (t + block_ranks(ranks.R_BLOCKS, j),),
        )
    k_a_split = tl.cdiv(tl.cdiv(K, blocks.BLOCK_K), splits) * blocks.BLOCK_K
    dy, row_offsets = pick(dys, member), m * pick(stride_dy, member)
    reduction = (split * k_a_split, min(split * k_a_split + k_a_split, K), K)
    # the mask is on x, not on dy: the extended GEMM applies it to dx
    sums = project(dy, row_offsets, columns, stride_k, reduction, rm, ((0,), 0), flags, ranks, blocks, False)
    SIZE: tl.constexpr = blocks.BLOCK_M * ranks.R_PADDED
    slot_workspace = (partial + slot.to(tl.int64) * splits * SIZE, counters, splits)
    if store_sums(sums, outputs, offsets, row_mask, slot_workspace, slot, split, ranks, blocks, SIZE):
        if NEED_DX:
            source, target = t + offsets, w + offsets
            core, scale = pick(cores, member), pick(scales, member)
            times_core(source, target, core, scale, row_mask, ranks, blocks, False, flags.CORE_PRECISION)


@triton.jit(do_not_specialize=["M", "splits"])
def prep_backward(
    # inputs
    dys,
    factors,
    cores,
    # outputs
    t,
    w,
    # workspace
    partial,
    counters,
    splits,
    # sizes
    M,
    Ks,
    # strides
    stride_dy,
    stride_factor,
    stride_w,
    # scalars
    scales,
    # flags
    NEED_DX: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    # ranks
    R: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    R_PADDED: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """t_i = dy_i B_i and w_i = s_i·t_i R_i, one member a program. Grid: `splits` programs a row block and member."""
    backward_rows(
        tl.program_id(0),
        (dys, factors, cores, t, w),
        (partial, counters, splits),
        (M, Ks),
        (stride_dy, stride_factor, stride_w),
        scales,
        PrepFlags(EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION),
        Ranks(R, R_BLOCKS, R_PADDED),
        PrepBlocks(BLOCK_M, BLOCK_K, BLOCK_J, SPLIT),
        NEED_DX,
    )
