"""Device functions of the thin products: project rows onto the ranks, add the splits' sums, multiply by the core.

The sums of a row block are a tuple with one fp32 block [BLOCK_M, ranks] for each member and each of its rank blocks:
Triton's blocks have sides that are powers of two, so that a rank such as 96 takes two, 64 and 32 wide.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .device_functions import arrives_last, block_offsets, keep_mask, ordered_sum

# Source rows of up to so many ranks stay in registers while the core's columns pass; more are read in blocks of 64 for
# each block of columns (they are in L1): [32, 256] in fp32 takes 128 registers of each thread as an operand of the MMA.
MAX_HELD_RANKS = tl.constexpr(128)


class PrepFlags(NamedTuple):
    """Flags of the thin products, see low_rank."""

    EVEN_R: tl.constexpr
    EVEN_K: tl.constexpr
    WIDE: tl.constexpr
    PRECISION: tl.constexpr
    CORE_PRECISION: tl.constexpr


class Ranks(NamedTuple):
    """The rank, the powers of two that cover it, and their sum."""

    R: tl.constexpr
    R_BLOCKS: tl.constexpr
    R_PADDED: tl.constexpr


class PrepBlocks(NamedTuple):
    """Blocks of the thin products, see low_rank."""

    BLOCK_M: tl.constexpr
    BLOCK_K: tl.constexpr
    BLOCK_J: tl.constexpr
    SPLIT: tl.constexpr


@triton.jit
def block_ranks(R_BLOCKS: tl.constexpr, block: tl.constexpr):
    """The ranks of a block: [0, R_BLOCKS[0]), or [R_BLOCKS[0], R_BLOCKS[0] + R_BLOCKS[1])."""
    return (R_BLOCKS[0] if block == 1 else 0) + tl.arange(0, R_BLOCKS[block])


@triton.jit
def zero_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A separate function: a tuple's item is a constant as an argument, but in a shape only since Triton 3.7."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def project(
    x,
    row_offsets,
    factors,
    stride_k,
    reduction,
    rows,
    dropout,
    flags,
    ranks,
    blocks,
    DROPOUT: tl.constexpr,
):
    """Σ_k x[m, k]·factor[k, rank] over a range of k: a tuple of fp32 sums [BLOCK_M, ranks of the block].

    row_offsets: of x's rows [BLOCK_M]; factors: pointers to k = 0 [ranks of the block], for each member and rank block;
    stride_k: from k to k + 1; reduction: (low, high, K); rows: row numbers, for the masks; dropout: (seeds, threshold),
    a mask for each member.
    """
    low, high, K = reduction
    seeds, threshold = dropout
    rk = tl.arange(0, blocks.BLOCK_K)
    sums = ()
    for i in tl.static_range(len(factors)):
        sums = sums + (zero_sums(blocks.BLOCK_M, ranks.R_BLOCKS[i % len(ranks.R_BLOCKS)]),)
    for start in range(low, high, blocks.BLOCK_K):
        k = start + rk
        if flags.EVEN_K:
            x_block = tl.load(x + row_offsets[:, None] + k[None, :])
        else:
            x_block = tl.load(x + row_offsets[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        # one x_block for all members' factors; tuples are immutable, so that the sums are a new one
        updated = ()
        kept = x_block
        for i in tl.static_range(len(factors)):
            if DROPOUT and i % len(ranks.R_BLOCKS) == 0:
                mask = keep_mask(seeds[i // len(ranks.R_BLOCKS)], threshold, rows, start, blocks.BLOCK_K)
                kept = tl.where(mask, x_block, 0.0)
            factor = factors[i][None, :] + (k * stride_k)[:, None]
            if flags.EVEN_R and flags.EVEN_K:
                factor = tl.load(factor)
            else:
                inside = (block_ranks(ranks.R_BLOCKS, i % len(ranks.R_BLOCKS)) < ranks.R)[None, :] & (k < K)[:, None]
                factor = tl.load(factor, mask=inside, other=0.0)
            updated = updated + (tl.dot(kept, factor, sums[i], input_precision=flags.PRECISION),)
        sums = updated
    return sums


@triton.jit
def store_sums(
    sums,
    outputs,
    m,
    row_mask,
    workspace,
    slot,
    split,
    ranks,
    blocks,
    SIZE: tl.constexpr,
):
    """Add the sums of all splits and store them at `outputs` (columns) + m (rows); True in the program that did.

    workspace: (partial of this slot, counters, splits); SIZE: elements of one split's sums.
    """
    partial, counters, splits = workspace
    last = True
    if blocks.SPLIT:
        offset = 0
        for i in tl.static_range(len(sums)):
            split_sums = partial + split * SIZE + offset
            tl.store(split_sums + block_offsets(blocks.BLOCK_M, ranks.R_BLOCKS[i % len(ranks.R_BLOCKS)]), sums[i])
            offset += blocks.BLOCK_M * ranks.R_BLOCKS[i % len(ranks.R_BLOCKS)]
        last = arrives_last(counters, slot, splits)
    if last:
        offset = 0
        for i in tl.static_range(len(sums)):
            total = sums[i]
            if blocks.SPLIT:
                first_sums = partial + offset
                block = block_offsets(blocks.BLOCK_M, ranks.R_BLOCKS[i % len(ranks.R_BLOCKS)])
                total = ordered_sum(first_sums, block, SIZE, splits, total)
            output = outputs[i][None, :] + m[:, None]
            inside = row_mask[:, None] & (block_ranks(ranks.R_BLOCKS, i % len(ranks.R_BLOCKS)) < ranks.R)[None, :]
            tl.store(output, total.to(output.dtype.element_ty), mask=inside)
            offset += blocks.BLOCK_M * ranks.R_BLOCKS[i % len(ranks.R_BLOCKS)]
        tl.debug_barrier()  # `times_core` reads in one thread what another one stored
    return last


@triton.jit
def source_columns(source, i, row_mask, ranks):
    """Ranks i of the source's rows in fp32, [BLOCK_M, len(i)]."""
    block = tl.load(source[:, None] + i[None, :], mask=row_mask[:, None] & (i < ranks.R)[None, :], other=0.0)
    return block.to(tl.float32)


@triton.jit
def add_core_block(
    left, core, i, j, acc, NARROW: tl.constexpr, ranks, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + left · core[i, j] (or core[j, i]); NARROW: left has 16 bits, see `times_core`."""
    block = core + (i[:, None] + (j * ranks.R)[None, :] if TRANSPOSED else (i * ranks.R)[:, None] + j[None, :])
    block = tl.load(block, mask=(i < ranks.R)[:, None] & (j < ranks.R)[None, :], other=0.0).to(tl.float32)
    if PRECISION == "tf32" and NARROW:
        high = (block.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(left, block - high, acc, input_precision=PRECISION)
        acc = tl.dot(left, high, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(left, block, acc, input_precision=PRECISION)
    return acc


@triton.jit
def times_core(
    source,
    target,
    core,
    scale,
    row_mask,
    ranks,
    blocks,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """target rows [R_PADDED] = scale · source rows [R] · core (or its transpose).

    The source is the sum as it was stored, rounded to x's dtype. The core stays fp32 whatever x's dtype. For a 16-bit
    x the product runs on TF32 tensor cores, twice: they ignore the lower 13 bits of an operand, which would shrink
    every entry of the core (v by 3.5e-4, measured on random cores of rank 96), so that the core is taken as the sum
    of what they read and of what is left. The source has no more bits than they read.
    """
    NARROW: tl.constexpr = source.dtype.element_ty.primitive_bitwidth < 32
    HELD: tl.constexpr = ranks.R_PADDED <= MAX_HELD_RANKS
    lefts = ()
    if HELD:
        for p in tl.static_range(len(ranks.R_BLOCKS)):
            lefts = lefts + (source_columns(source, block_ranks(ranks.R_BLOCKS, p), row_mask, ranks),)
    for column in tl.range(0, ranks.R_PADDED, blocks.BLOCK_J, num_stages=2):
        j = column + tl.arange(0, blocks.BLOCK_J)
        acc = tl.zeros((blocks.BLOCK_M, blocks.BLOCK_J), tl.float32)
        if HELD:
            for p in tl.static_range(len(ranks.R_BLOCKS)):
                i = block_ranks(ranks.R_BLOCKS, p)
                acc = add_core_block(lefts[p], core, i, j, acc, NARROW, ranks, TRANSPOSED, PRECISION)
        else:
            for start in range(0, ranks.R_PADDED, 64):
                i = start + tl.arange(0, 64)
                left = source_columns(source, i, row_mask, ranks)
                acc = add_core_block(left, core, i, j, acc, NARROW, ranks, TRANSPOSED, PRECISION)
        # the masks make columns [R, R_PADDED) zero: nothing uninitialized is left in v or w
        tl.store(target[:, None] + j[None, :], (acc * scale).to(target.dtype.element_ty), mask=row_mask[:, None])
