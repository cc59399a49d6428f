"""Device functions of the thin products: project rows onto the ranks, add the splits' sums, multiply by the core.

The sums of a row block are a tuple with one fp32 block [BLOCK_M, ranks] for each member and each of its rank blocks:
Triton's blocks have sides that are powers of two, so that a rank such as 96 takes two, 64 and 32 wide.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .device_functions import arrives_last, block_offsets, keep_mask, ordered_sum

# Source rows of up to this many ranks stay in registers while the core's columns pass; more are read in blocks of 64
# for each block of columns (from L1): [32, 256] in fp32 takes 128 registers per thread as an operand of the MMA.
MAX_HELD_RANKS = tl.constexpr(128)

# Flags, ranks and blocks of the thin products, see low_rank, and what `times_core` alone reads.
PrepConstants = namedtuple(
    "PrepConstants",
    "DROPOUT EVEN_R EVEN_K PRECISION CORE_PRECISION R R_BLOCKS R_PADDED BLOCK_M BLOCK_K BLOCK_J SPLIT",
)
CoreConstants = namedtuple("CoreConstants", "CORE_PRECISION R R_BLOCKS R_PADDED BLOCK_M BLOCK_J")


@triton.jit
def block_ranks(R_BLOCKS: tl.constexpr, block: tl.constexpr):
    """The ranks of a block: [0, R_BLOCKS[0]), or [R_BLOCKS[0], R_BLOCKS[0] + R_BLOCKS[1])."""
    return (R_BLOCKS[0] if block == 1 else 0) + tl.arange(0, R_BLOCKS[block])


@triton.jit
def zero_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return zeros. A function, as a tuple's item is constant as an argument, but in a shape only since Triton 3.7."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def project(x, row_offsets, factors, stride_k, reduction, dropout, constants):
    """Σ_k x[m, k]·factor[k, rank] over a range of k: a tuple of fp32 sums [BLOCK_M, ranks of the block].

    row_offsets: of x's rows [BLOCK_M]; factors: pointers to k = 0 [ranks of the block], for each member and rank block;
    stride_k: from k to k + 1; reduction: (low, high, K); dropout: (seeds, threshold, row numbers), a mask for each
    member.
    """
    low, high, K = reduction
    seeds, threshold, rows = dropout
    rk = tl.arange(0, constants.BLOCK_K)
    sums = ()
    for i in tl.static_range(len(factors)):
        sums = sums + (zero_sums(constants.BLOCK_M, constants.R_BLOCKS[i % len(constants.R_BLOCKS)]),)
    for start in range(low, high, constants.BLOCK_K):
        k = start + rk
        if constants.EVEN_K:
            x_block = tl.load(x + row_offsets[:, None] + k[None, :])
        else:
            x_block = tl.load(x + row_offsets[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        # one x_block for all members' factors; tuples are immutable, so the sums become a new one
        updated = ()
        kept = x_block
        for i in tl.static_range(len(factors)):
            if constants.DROPOUT and i % len(constants.R_BLOCKS) == 0:
                mask = keep_mask(seeds[i // len(constants.R_BLOCKS)], threshold, rows, start, constants.BLOCK_K)
                kept = tl.where(mask, x_block, 0.0)
            factor = factors[i][None, :] + (k * stride_k)[:, None]
            if constants.EVEN_R and constants.EVEN_K:
                factor = tl.load(factor)
            else:
                inside = (block_ranks(constants.R_BLOCKS, i % len(constants.R_BLOCKS)) < constants.R)[None, :] & (
                    k < K
                )[:, None]
                factor = tl.load(factor, mask=inside, other=0.0)
            updated = updated + (tl.dot(kept, factor, sums[i], input_precision=constants.PRECISION),)
        sums = updated
    return sums


@triton.jit
def store_sums(sums, outputs, m, row_mask, workspace, constants):
    """Add the sums of all splits and store them at `outputs` (columns) + m (rows); return True in the program that did.

    workspace: (partial, counters, splits, slot, split).
    """
    partial, counters, splits, slot, split = workspace
    SIZE: tl.constexpr = constants.BLOCK_M * constants.R_PADDED * (len(sums) // len(constants.R_BLOCKS))
    partial += slot.to(tl.int64) * splits * SIZE
    last = True
    if constants.SPLIT:
        offset = 0
        for i in tl.static_range(len(sums)):
            split_sums = partial + split * SIZE + offset
            tl.store(
                split_sums + block_offsets(constants.BLOCK_M, constants.R_BLOCKS[i % len(constants.R_BLOCKS)]), sums[i]
            )
            offset += constants.BLOCK_M * constants.R_BLOCKS[i % len(constants.R_BLOCKS)]
        last = arrives_last(counters, slot, splits)
    if last:
        offset = 0
        for i in tl.static_range(len(sums)):
            total = sums[i]
            if constants.SPLIT:
                first_sums = partial + offset
                block = block_offsets(constants.BLOCK_M, constants.R_BLOCKS[i % len(constants.R_BLOCKS)])
                total = ordered_sum(first_sums, block, SIZE, splits, total)
            output = outputs[i][None, :] + m[:, None]
            inside = (
                row_mask[:, None]
                & (block_ranks(constants.R_BLOCKS, i % len(constants.R_BLOCKS)) < constants.R)[None, :]
            )
            tl.store(output, total.to(output.dtype.element_ty), mask=inside)
            offset += constants.BLOCK_M * constants.R_BLOCKS[i % len(constants.R_BLOCKS)]
        tl.debug_barrier()  # `times_core` reads in one thread what another one stored
    return last


@triton.jit
def source_columns(source, i, row_mask, R: tl.constexpr):
    """Load ranks i of the source's rows in fp32, [BLOCK_M, len(i)]."""
    block = tl.load(source[:, None] + i[None, :], mask=row_mask[:, None] & (i < R)[None, :], other=0.0)
    return block.to(tl.float32)


@triton.jit
def core_block(core, i, j, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """core[i, j], or core[j, i], in fp32."""
    block = core + (i[:, None] + (j * R)[None, :] if TRANSPOSED else (i * R)[:, None] + j[None, :])
    return tl.load(block, mask=(i < R)[:, None] & (j < R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_core_product(left, block, acc, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left · block of the core; NARROW: left has 16 bits, see `times_core`."""
    if PRECISION == "tf32" and NARROW:
        high = (block.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(left, block - high, acc, input_precision=PRECISION)
        acc = tl.dot(left, high, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(left, block, acc, input_precision=PRECISION)
    return acc


@triton.jit
def times_core(source, target, core, scale, row_mask, constants, TRANSPOSED: tl.constexpr):
    """target rows [R_PADDED] = scale · source rows [R] · core (or its transpose).

    The source is the sum as it was stored, rounded to x's dtype. The core stays fp32 whatever x's dtype. For a 16-bit
    x the product runs on TF32 tensor cores, twice: they ignore the lower 13 bits of an operand, which would shrink
    every entry of the core (v by 3.5e-4, measured on random cores of rank 96), so the core is split into the part
    that they read and the rest. The source has no more bits than they read.
    """
    NARROW: tl.constexpr = source.dtype.element_ty.primitive_bitwidth < 32
    HELD: tl.constexpr = constants.R_PADDED <= MAX_HELD_RANKS
    lefts = ()
    if HELD:
        for p in tl.static_range(len(constants.R_BLOCKS)):
            lefts = lefts + (source_columns(source, block_ranks(constants.R_BLOCKS, p), row_mask, constants.R),)
    for column in tl.range(0, constants.R_PADDED, constants.BLOCK_J, num_stages=2):
        j = column + tl.arange(0, constants.BLOCK_J)
        acc = tl.zeros((constants.BLOCK_M, constants.BLOCK_J), tl.float32)
        if HELD:
            for p in tl.static_range(len(constants.R_BLOCKS)):
                i = block_ranks(constants.R_BLOCKS, p)
                block = core_block(core, i, j, constants.R, TRANSPOSED)
                acc = add_core_product(lefts[p], block, acc, NARROW, constants.CORE_PRECISION)
        else:
            for start in range(0, constants.R_PADDED, 64):
                i = start + tl.arange(0, 64)
                left = source_columns(source, i, row_mask, constants.R)
                block = core_block(core, i, j, constants.R, TRANSPOSED)
                acc = add_core_product(left, block, acc, NARROW, constants.CORE_PRECISION)
        # the masks make columns [R, R_PADDED) zero: nothing uninitialized is left in v or w
        tl.store(target[:, None] + j[None, :], (acc * scale).to(target.dtype.element_ty), mask=row_mask[:, None])
