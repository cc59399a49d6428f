"""Device functions of a GEMM's K loop: one loop over several reductions, chained one after another."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

Reduction = namedtuple("Reduction", "K_MAJOR EVEN_K PRECISION BLOCK_K")  # constants that `accumulate` reads


@triton.jit
def accumulate(acc, operands, steps, m, n, reduction):
    """acc + Σ_i left_i right_i, over steps [low, high) of reductions that are chained one after another.

    operands: tuples (lefts, rights, left strides, right strides, lengths). left_i [rows m, length_i]; right_i is
    [columns n, length_i] if K_MAJOR, else [length_i, columns n]. Every length is rounded up to whole steps, so that no
    step straddles two operands. A chain of selects moves the pointers on: one loop, one software pipeline. reduction: a
    tuple that has the names of `Reduction`.
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
