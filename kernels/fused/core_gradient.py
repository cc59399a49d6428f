"""The gradient of the cores, dR_i = s_i·t_iᵀ u_i [R, R]: a reduction over all rows.

The first programs of the extended GEMM's grid run it. dR is small and M is long, so that its tiles alone would be few
and slow: each tile's rows are cut into chunks of a fixed length, one program each. Arguments have the names of
`extended_gemm`, without the prefix CORE_.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .device_functions import pick, sum_of_shares

# Rows of a chunk, whether a tile has several chunks, side of a tile, rows of a step, precision, ranks.
CoreBlocks = namedtuple("CoreBlocks", "CHUNK_M SPLIT BLOCK_R BLOCK_M PRECISION R R_PADDED")


@triton.jit
def core_gradient(pid, operands, workspace, M, strides, blocks):
    """One tile of dR_i = s_i·t_iᵀ u_i, over one of the chunks of rows; the last chunk to finish adds them up in order.

    operands: (t, us, dcores, scales); workspace: (partial, counters, chunks); strides: (stride_t, stride_u).
    The grid's fastest index is the chunk, then the tile, then the member. A slot is a tile of a member.
    """
    t, us, dcores, scales = operands
    partial, counters, chunks = workspace
    stride_t, stride_u = strides
    SIDE: tl.constexpr = (blocks.R_PADDED + blocks.BLOCK_R - 1) // blocks.BLOCK_R  # tiles along each dimension of dR
    slot, chunk = (pid // chunks, pid % chunks) if blocks.SPLIT else (pid, 0)
    member, tile = slot // (SIDE * SIDE), slot % (SIDE * SIDE)
    i = tile // SIDE * blocks.BLOCK_R + tl.arange(0, blocks.BLOCK_R)
    j = tile % SIDE * blocks.BLOCK_R + tl.arange(0, blocks.BLOCK_R)
    left, right = t + member * blocks.R_PADDED, pick(us, member)
    acc = tl.zeros((blocks.BLOCK_R, blocks.BLOCK_R), tl.float32)
    for row in range(chunk * blocks.CHUNK_M, min(chunk * blocks.CHUNK_M + blocks.CHUNK_M, M), blocks.BLOCK_M):
        m = row + tl.arange(0, blocks.BLOCK_M)
        # indexed as tᵀ: a transposed view of a load would keep it out of the pipeline's prefetch
        lhs = tl.load(
            left + (m.to(tl.int64) * stride_t)[None, :] + i[:, None],
            mask=(m[None, :] < M) & (i[:, None] < blocks.R),
            other=0.0,
        )
        rhs = tl.load(
            right + (m.to(tl.int64) * stride_u)[:, None] + j[None, :],
            mask=(m[:, None] < M) & (j[None, :] < blocks.R),
            other=0.0,
        )
        acc = tl.dot(lhs, rhs, acc, input_precision=blocks.PRECISION)
    last, acc = sum_of_shares(acc, chunk, (partial, counters, slot, chunks), blocks.SPLIT, False)
    if last:
        inside = (i[:, None] < blocks.R) & (j[None, :] < blocks.R)
        tl.store(pick(dcores, member) + i[:, None] * blocks.R + j[None, :], acc * pick(scales, member), mask=inside)
