"""Products with an R for each row of a batch: v_i = s·u_i R_kᵀ (w_i = s·t_i R_k), and dR_k = s·Σ t_iᵀ u_i.

A batch row is `tokens` consecutive rows of u [M, R], M = rows · tokens. It reads the R that `places` selects in place,
without a copy. -1 means no adapter, and gives zero.

Arguments of `times_row_cores` and `row_core_gradients`; strides are of rows, in elements, and the last dimension is
contiguous.

             times_row_cores                           row_core_gradients
  inputs     source: u (t) [M, R]                      t, u: [M, R]
             cores: R_k [R, R], contiguous each        order: rows by adapter, int32; each adapter's in batch order
             places: k of each row or -1, int32        starts: each adapter's first index in `order`, and the end, int32
  outputs    target: v (w) [M, R_PADDED]               dcores: dR_k [R, R]; `adapters` has the k of each, int32
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

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .block_sizes import CORE_BLOCK, PrepConfig, cdiv, padded_rank, rank_blocks
from .launcher import Launch, launch
from .operands import core_precision, on_device, precision, unit_rows, whole
from .projection import CoreConstants, times_core

SHORT, LONG = PrepConfig(16, 0, 4, 2), PrepConfig(32, 0, 4, 2)  # one token per row, as in decoding, or a sequence
STEP = 32  # tokens per step of dR

_copies: MutableMapping[Tensor, tuple[Tensor, Tensor]] = WeakIdKeyDictionary()  # values when copied, and the copy


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
    # 64 bits: a bank of a few thousand adapters has more than 2^31 numbers
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


class RowProducts(NamedTuple):
    """R's [K, r, r] in any floating-point dtype, the index of each row's R among them or -1 [n], and s.

    `index` is int64 in [-1, K): on the CPU, or on the rows' device, where only the kernel reads it.
    """

    cores: Tensor
    index: Tensor
    scale: float

    def times(self, left: Tensor, transposed: bool, out: Tensor) -> Tensor:
        """out [M, padded r] = s·left_i R_kᵀ, or s·left_i R_k, of left [M, r], both of x's dtype; zero where k = -1."""
        if len(left) == 0 or len(self.cores) == 0:
            return out.zero_()
        tokens, left, cores = len(left) // len(self.index), unit_rows(left), whole(self.cores)
        config = SHORT if tokens <= SHORT.block_m else LONG
        arguments = dict(
            source=left,
            cores=cores,
            places=_places(self.index, left.device),
            target=out,
            tokens=tokens,
            stride_source=left.stride(0),
            stride_core=cores.stride(0),
            stride_target=out.stride(0),
            scale=self.scale,
            TRANSPOSED=transposed,
            CORE_PRECISION=core_precision(left.dtype),
            R=cores.shape[1],
            R_BLOCKS=rank_blocks(cores.shape[1]),
            R_PADDED=out.shape[1],
            BLOCK_M=config.block_m,
            BLOCK_J=32 if out.shape[1] % 32 == 0 else 16,
        )
        with on_device(left):
            launch(Launch(times_row_cores, len(self.index) * cdiv(tokens, config.block_m), arguments, config))
        return out

    def gradients(self, t: Tensor, u: Tensor) -> Tensor:
        """dR_k = s·Σ t_iᵀ u_i [K, r, r] in R's dtype, over the rows of k in their order; zero if there are none."""
        index, gradients = self.index, self.cores.new_zeros(self.cores.shape)
        order = index.argsort(stable=True)[int((index < 0).sum()) :]  # rows by adapter, without those of none
        if len(order) == 0 or len(t) == 0:
            return gradients
        present, counts = index[order].unique_consecutive(return_counts=True)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        r, width = gradients.shape[1], padded_rank(gradients.shape[1])
        t, u = unit_rows(t), unit_rows(u)
        arguments = dict(
            t=t,
            u=u,
            order=order.to(t.device, torch.int32),
            starts=starts.to(t.device, torch.int32),
            adapters=present.to(t.device, torch.int32),
            dcores=gradients,
            tokens=len(t) // len(index),
            stride_t=t.stride(0),
            stride_u=u.stride(0),
            scale=self.scale,
            PRECISION=precision(t.dtype),
            R=r,
            R_PADDED=width,
            BLOCK_R=CORE_BLOCK,
            BLOCK_M=STEP,
        )
        with on_device(t):
            launch(Launch(row_core_gradients, len(present) * cdiv(width, CORE_BLOCK) ** 2, arguments, LONG))
        return gradients


def _places(index: Tensor, device: torch.device) -> Tensor:
    """Return the index on the device, copied once for all layers of a step, which share its tensor."""
    if index.is_cuda:
        return index
    seen, known = _copies.get(index, (None, None))
    if seen is None or known is None or known.device != device or not torch.equal(seen, index):
        seen, known = index.clone(), index.to(device, torch.int32)
        _copies[index] = seen, known
    return known
