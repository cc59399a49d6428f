"""Pieces that several kernels use: choosing among a group's members, and sums of several programs in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(items, index):
    """The item of a tuple at a run-time index."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        item = tl.where(index == i, items[i], item)
    return item


@triton.jit
def places(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a [ROWS, COLUMNS] block that lies in one piece."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def arrive(counters, slot, COUNT: tl.constexpr):
    """Whether this program is the last of COUNT to come here; the last one leaves the counter at zero.

    What the programs stored before is visible to the last. Nobody waits.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counters + slot, 1, sem="acq_rel") == COUNT - 1
    if last:
        tl.store(counters + slot, 0)
    return last


@triton.jit
def ordered_sum(partial, offsets, size, COUNT: tl.constexpr, like):
    """Σ_i partial[i·size + offsets] for i = 0, 1, ... COUNT - 1, in this order."""
    total = tl.zeros_like(like)
    for i in tl.range(0, COUNT, loop_unroll_factor=1):  # unrolled, it would keep COUNT blocks in registers
        total += tl.load(partial + i * size + offsets, cache_modifier=".cg")
    return total


@triton.jit
def keep_mask(seed, threshold, rows, columns):
    """Which elements [rows, columns] of x dropout keeps: a function of the seed and the element's place alone."""
    bits = tl.philox(seed, columns[None, :].to(tl.uint32), rows[:, None].to(tl.uint32), 0, 0)[0]
    return tl.uint_to_uniform_float(bits) >= threshold
