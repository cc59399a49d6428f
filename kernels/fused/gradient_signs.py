"""G [N, K] (+)= dyᵀ x over tokens in their order, and on the last call the signs of G, 32 a word.

A program owns a tile of G. Its sum starts from the fp32 tile of the calls before, goes over all tokens in order, and
is written back, or packed, or both: with one call and no use for its values, G never reaches memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packed(flags, BN: tl.constexpr, BK: tl.constexpr):
    """Flags [BN, BK] as words [BN, BK / 32]: bit j of a word is its column j."""
    bits = tl.reshape(flags.to(tl.int32), (BN, BK // 32, 32)) << tl.arange(0, 32)[None, None, :]
    return tl.sum(bits, axis=2)  # no two share a bit


@triton.jit(do_not_specialize=["M"])
def grad_sign(
    dy, x, total, words, nonzero, counts,
    M, N, K,
    sdy, sx, st, sw,
    FRESH: tl.constexpr, KEEP: tl.constexpr, SIGNS: tl.constexpr, EVEN: tl.constexpr, EVEN_M: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dy [M, N], x [M, K], total [N, K] fp32, words and nonzero [N, K/32] int32, counts [tiles, 3] fp32.

    counts of a tile: Σ G², exact zeros, entries that are not finite.
    """
    tile = tl.program_id(0)
    across, down = tl.cdiv(K, BK), tl.cdiv(N, BN)
    band = GROUP * across
    first = tile // band * GROUP
    height = min(down - first, GROUP)
    n = (first + tile % band % height) * BN + tl.arange(0, BN)
    k = tile % band // height * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    if WIDE:
        n = n.to(tl.int64)
    if FRESH:
        acc = tl.zeros((BN, BK), tl.float32)
    elif EVEN:
        acc = tl.load(total + n[:, None] * st + k[None, :])
    else:
        acc = tl.load(total + n[:, None] * st + k[None, :], mask=inside, other=0.0)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        if WIDE:
            m = m.to(tl.int64)
        left, right = dy + m[:, None] * sdy + n[None, :], x + m[:, None] * sx + k[None, :]
        if EVEN and EVEN_M:
            dd, xx = tl.load(left), tl.load(right)
        elif EVEN:
            dd, xx = tl.load(left, mask=(m < M)[:, None], other=0.0), tl.load(right, mask=(m < M)[:, None], other=0.0)
        else:
            dd = tl.load(left, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
            xx = tl.load(right, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dd), xx, acc, input_precision=PRECISION)
    if KEEP:
        if EVEN:
            tl.store(total + n[:, None] * st + k[None, :], acc)
        else:
            tl.store(total + n[:, None] * st + k[None, :], acc, mask=inside)
    if SIGNS:
        w = tile % band // height * (BK // 32) + tl.arange(0, BK // 32)
        spot = n[:, None] * sw + w[None, :]
        there = (n < N)[:, None] & (w < tl.cdiv(K, 32))[None, :]
        tl.store(words + spot, packed((acc > 0) & inside, BN, BK), mask=there)
        tl.store(nonzero + spot, packed((acc != 0) & inside, BN, BK), mask=there)
        size = tl.abs(acc)
        tl.store(counts + tile * 3, tl.sum(tl.where(inside, acc * acc, 0.0)))
        tl.store(counts + tile * 3 + 1, tl.sum(tl.where(inside & (acc == 0), 1.0, 0.0)))
        tl.store(counts + tile * 3 + 2, tl.sum(tl.where(inside & ((size == float("inf")) | (acc != acc)), 1.0, 0.0)))
