"""Device functions that several kernels use: selection from a tuple, the ordered split sum, the dropout mask.

Sums that several programs share (split-K) follow one protocol: every program stores its fp32 block in `partial` and
increments a counter; the program whose increment is the last loads all blocks, adds them in the order of their index
and writes the result. No program waits for another, and the order of addition does not depend on which one is last,
so that a result repeats to the bit where an atomic add would not.

Groups of run-time arguments are passed to device functions as plain tuples and unpacked there. Groups of constants are
named tuples, read by attribute: Triton's assignment, unpacking included, turns a constant into a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(items, index):
    """The item of a tuple at a run-time index: tuples have no indexing by a tensor, so a chain of selects does it."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(index == i, items[i], item)
    return item


@triton.jit
def block_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a contiguous row-major block [ROWS, COLUMNS]."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def arrives_last(counters, slot, count):
    """True in the last of the `count` programs that call this for a slot; stores made before are visible to that one.

    The barrier orders the stores of all threads of this program before the increment (release); the increment orders
    those of the other programs before this one's loads (acquire). The last program leaves the counter at zero: nobody
    else touches it any more, and the next launch finds what it needs without a memset between them.
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
def keep_mask(seed, threshold, rows, first, COLUMNS: tl.constexpr):
    """Which elements [rows, first + COLUMNS] of x dropout keeps: those whose 32 random bits are `threshold` or more.

    Philox at counter (column // 4, row) gives the words of four columns, of which `first` is a multiple. A function of
    the seed and the element's position alone: forward and backward, whatever their blocks, generate the same mask and
    nothing is stored.
    """
    quads = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quads[None, :], rows[:, None].to(tl.uint32), 0, 0)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= threshold.to(tl.uint32, bitcast=True)
