"""Products with an R for each row of a batch: v_i = s·u_i R_kᵀ (w_i = s·t_i R_k), and dR_k = s·Σ t_iᵀ u_i.

A row is `tokens` rows of u [M, R] in turn, M = rows · tokens; it reads the R that `places` names in place, so that
no copy of it is made. -1 is no adapter, whose rows are zero.

Arguments of `times_row_cores` and `row_core_gradients`; strides are of rows, in elements, and the last dimension is
contiguous.

             times_row_cores                           row_core_gradients
  inputs     source: u (t) [M, R]                      t, u: [M, R]
             cores: R_k [R, R], contiguous each        order: rows by adapter, int32; those of one in their own order
             places: k of each row or -1, int32        starts: where each adapter's begin in it, and the end, int32
  outputs    target: v (w) [M, R_PADDED]               dcores: dR_k [R, R] by `adapters`: k of each, int32
  sizes      tokens                                    tokens
  strides    stride_source, stride_core, stride_target stride_t, stride_u
  scalars    scale: s                                  scale: s
  flags      TRANSPOSED: R_kᵀ; CORE_PRECISION as in    PRECISION: of tl.dot
             low_rank
  ranks      R; R_BLOCKS: the powers of two that cover it; R_PADDED: their sum
  blocks     BLOCK_M tokens of a row; BLOCK_J: columns BLOCK_R: side of a tile of dR; BLOCK_M: tokens of a step
             of v per step
"""

from __future__ import annotations

import triton
import triton.language as tl

from .projection import CoreConstants, times_core


@triton.jit(do_not_specialize=["tokens"])
def times_row_cores(
    source, cores, places,  # inputs
    target,  # outputs
    tokens,  # sizes
    stride_source, stride_core, stride_target,  # strides
    scale,  # scalars
    TRANSPOSED: tl.constexpr, CORE_PRECISION: tl.constexpr,  # flags
    R: tl.constexpr, R_BLOCKS: tl.constexpr, R_PADDED: tl.constexpr,  # ranks
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,  # blocks
):  # fmt: skip
    """target = scale · source · R_kᵀ (R_k) of every row. Grid: the blocks of tokens of all rows."""
    pid, blocks_of_row = tl.program_id(0), tl.cdiv(tokens, BLOCK_M)
    row = pid // blocks_of_row
    token = pid % blocks_of_row * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    # 64 bits: a bank of some thousand adapters has more than 2^31 numbers
    m = row.to(tl.int64) * tokens + tl.where(inside, token, 0)
    place = tl.load(places + row)
    targets = target + m * stride_target
    if place < 0:
        for column in range(0, R_PADDED, BLOCK_J):
            j = column + tl.arange(0, BLOCK_J)
            zeros = tl.zeros((BLOCK_M, BLOCK_J), target.dtype.element_ty)
            tl.store(targets[:, None] + j[None, :], zeros, mask=inside[:, None])
    else:
        times_core(
            source + m * stride_source,
            targets,
            cores + place.to(tl.int64) * stride_core,
            scale,
            inside,
            CoreConstants(CORE_PRECISION, R, R_BLOCKS, R_PADDED, BLOCK_M, BLOCK_J),
            TRANSPOSED,
        )


@triton.jit(do_not_specialize=["tokens"])
def row_core_gradients(
    t, u, order, starts, adapters,  # inputs
    dcores,  # outputs
    tokens,  # sizes
    stride_t, stride_u,  # strides
    scale,  # scalars
    PRECISION: tl.constexpr,  # flags
    R: tl.constexpr, R_PADDED: tl.constexpr,  # ranks
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,  # blocks
):  # fmt: skip
    """A tile of dR_k, over the tokens of k's rows in their order. Grid: the tiles of all adapters that have rows."""
    SIDE: tl.constexpr = (R_PADDED + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    slot, tile = pid // (SIDE * SIDE), pid % (SIDE * SIDE)
    i = tile // SIDE * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tile % SIDE * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.load(starts + slot)
    count = (tl.load(starts + slot + 1) - start) * tokens
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for first in range(0, count, BLOCK_M):
        token = first + tl.arange(0, BLOCK_M)
        inside = token < count
        row = tl.load(order + start + token // tokens, mask=inside, other=0)
        m = row.to(tl.int64) * tokens + token % tokens
        left = tl.load(t + (m * stride_t)[None, :] + i[:, None], mask=inside[None, :] & (i < R)[:, None], other=0.0)
        right = tl.load(u + (m * stride_u)[:, None] + j[None, :], mask=inside[:, None] & (j < R)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    target = dcores + tl.load(adapters + slot).to(tl.int64) * R * R
    tile_inside = (i < R)[:, None] & (j < R)[None, :]
    tl.store(target + i[:, None] * R + j[None, :], (acc * scale).to(dcores.dtype.element_ty), mask=tile_inside)
