"""Device functions that several kernels use: selection from a tuple, the K loop, the ordered split sum, dropout.

Sums that several programs share (split-K) follow one protocol: every program stores its fp32 block in `partial` and
increments a counter; the program whose increment is the last loads all blocks, adds them in the order of their index
and writes the result. No program waits for another, and the order of addition does not depend on which one is last,
so that a result repeats to the bit where an atomic add would not.

Groups of run-time arguments are passed to device functions as plain tuples and unpacked there. Groups of constants are
named tuples, read by attribute: Triton's assignment, unpacking included, turns a constant into a tensor, unless it is
annotated as `tl.constexpr`.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..compat import find
from ..compat.triton import PRIVATE

gdc_wait, gdc_launch_dependents = find(PRIVATE["gdc_wait"]), find(PRIVATE["gdc_launch_dependents"])
Reduction = namedtuple("Reduction", "K_MAJOR EVEN_K PRECISION BLOCK_K")  # constants that `accumulate` reads


@triton.jit
def pick(items, index):
    """The item of a tuple at a run-time index: tuples have no indexing by a tensor, so a chain of selects does it."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(index == i, items[i], item)
    return item


@triton.jit
def accumulate(acc, operands, steps, m, n, reduction):
    """acc + Σ_i left_i right_i, over steps [low, high) of reductions that are chained one after another.

    operands: tuples (lefts, rights, left strides, right strides, lengths). left_i [rows m, length_i]; right_i is
    [columns n, length_i] if K_MAJOR, else [length_i, columns n]. Every length is rounded up to whole steps, so that no
    step straddles two operands. A chain of selects switches the pointers: one loop, one software pipeline. reduction: a
    tuple that has the fields of `Reduction`.
    """
    lefts, rights, left_strides, right_strides, lengths = operands
    low, high = steps
    rk = tl.arange(0, reduction.BLOCK_K)
    for step in range(low, high):
        left, right, length, first, edge = lefts[0], rights[0], lengths[0], 0, 0
        left_stride, right_stride = left_strides[0], right_strides[0]
        for i in tl.static_range(1, len(lefts)):
            edge += tl.cdiv(lengths[i - 1], reduction.BLOCK_K)
            reached = step >= edge
            left, right = tl.where(reached, lefts[i], left), tl.where(reached, rights[i], right)
            left_stride = tl.where(reached, left_strides[i], left_stride)
            right_stride = tl.where(reached, right_strides[i], right_stride)
            first, length = tl.where(reached, edge, first), tl.where(reached, lengths[i], length)
        k = (step - first) * reduction.BLOCK_K + rk
        left += (m * left_stride)[:, None] + k[None, :]
        # W is indexed as [K, N] whatever its layout: a transposed view of a load would keep it out of the prefetch.
        wide_k = k.to(n.dtype)  # rows of W are counted by n forward and by k backward: either may need 64 bits
        if reduction.K_MAJOR:
            right += (n * right_stride)[None, :] + k[:, None]
        else:
            right += (wide_k * right_stride)[:, None] + n[None, :]
        if reduction.EVEN_K:
            lhs, rhs = tl.load(left), tl.load(right)
        else:
            inside = k < length
            lhs = tl.load(left, mask=inside[None, :], other=0.0)
            rhs = tl.load(right, mask=inside[:, None], other=0.0)
        acc = tl.dot(lhs, rhs, acc, input_precision=reduction.PRECISION)
    return acc


@triton.jit
def chain(first, second):
    """The operands of two chained reductions as one: the base's steps, then the adapter's."""
    chained = ()
    for i in tl.static_range(len(first)):
        chained = chained + (first[i] + second[i],)
    return chained


@triton.jit
def block_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a contiguous row-major block [ROWS, COLUMNS]."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def arrives_last(counters, slot, count):
    """Return True in the last of the `count` programs that call this for a slot; it sees all stores made before.

    The barrier orders the stores of all threads of this program before the increment (release); the increment orders
    those of the other programs before this one's loads (acquire). The last program resets the counter to zero: no other
    program uses it anymore, and the next launch needs no memset.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counters + slot, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(counters + slot, 0)
    return last


@triton.jit
def ordered_sum(partial, offsets, size, count, like):
    """Σ_i partial[i·size + offsets] for i = 0, 1, ... count - 1, in this order; `like` gives shape and dtype.

    The loads bypass L1 (.cg): its lines are not coherent with what other multiprocessors stored.
    """
    total = tl.zeros_like(like)
    for i in range(0, count):  # a run-time count: the compiler does not unroll it, and one kernel serves all counts
        total += tl.load(partial + i * size + offsets, cache_modifier=".cg")
    return total


@triton.jit
def sum_of_shares(acc, share, workspace, SPLIT: tl.constexpr, WIDE: tl.constexpr):
    """Return (is_last, sum): True and the block's sum in the last program that shares it, else False and its share.

    workspace: (partial, counters, slot of the block, count of shares); without SPLIT there is one. WIDE: `partial` may
    need offsets of 64 bits.
    """
    last = True
    if SPLIT:
        partial, counters, slot, count = workspace
        offsets = block_offsets(acc.shape[0], acc.shape[1])
        sums = partial + (slot.to(tl.int64) if WIDE else slot) * count * acc.shape[0] * acc.shape[1]
        tl.store(sums + share * acc.shape[0] * acc.shape[1] + offsets, acc)
        last = arrives_last(counters, slot, count)
        if last:
            acc = ordered_sum(sums, offsets, acc.shape[0] * acc.shape[1], count, acc)
    return last, acc


@triton.jit
def wide_product(a, FACTOR: tl.constexpr):
    """The two words of a·FACTOR, low and high: one instruction on a GPU, where `umulhi` and `*` would take two."""
    wide = a.to(tl.uint64) * FACTOR
    return wide.to(tl.uint32), (wide >> 32).to(tl.uint32)


@triton.jit
def philox(seed, c0, c1):
    """The four words of Philox 4x32-10 at counter (c0, c1, 0, 0), the same as `tl.philox`'s."""
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c1)
    for _ in tl.static_range(10):
        low0, high0 = wide_product(c0, 0xD2511F53)
        low2, high2 = wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_mask(seed, threshold, rows, first, COLUMNS: tl.constexpr):
    """The elements [rows, first + COLUMNS] of x that dropout keeps: their 16 random bits are `threshold` or more.

    Philox at counter (column // 8, row) gives the half words of eight columns; `first` is a multiple of eight. The mask
    depends only on the seed and the element's position: forward and backward, whatever their blocks, generate the same
    one, and nothing is stored. `threshold` has its 16 bits in the upper half of 32.

    Written as if every element computed all four words: a thread loads eight columns of x at once, and the compiler
    computes once what they share. Joining the words of a block into a wider mask instead would keep x from being read
    by ldmatrix (sm_86: 839 instructions per step of 64 x 64, not 436).
    """
    column = tl.arange(0, COLUMNS)[None, :]
    c0, c1 = tl.broadcast((first // 8 + (column >> 3)).to(tl.uint32), rows.to(tl.uint32)[:, None])
    w0, w1, w2, w3 = philox(seed, c0, c1)
    odd, far = (column & 2) != 0, (column & 4) != 0  # pair of columns 0, 1, 2 or 3
    word = tl.where(far, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    word = tl.where((column & 1) != 0, word, word << 16)  # bits below the upper half word do not matter
    return word >= threshold.to(tl.uint32, bitcast=True)
