"""The thin products before the extended GEMM: u = x Aᵀ, v = s·u Rᵀ forward; t = dy B, w = s·t R backward.

x (dy) is read once. R is read as fp32 whatever x's dtype. A rank is covered by one or two powers of two (96 = 64 + 32),
so that no third of the work is padding. The reduction is split by the shape alone; the last program of a row block to end
adds the fp32 partial sums in their order and does the r x r product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import keep_mask
from .parts import arrive, ordered_sum, pick


@triton.jit
def load_factor(pointer, stride, rank, k, R: tl.constexpr, K, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr,
                RANK_MAJOR: tl.constexpr):  # fmt: skip
    """A block of A [R, K] (RANK_MAJOR) or of B [K, R], as [k, rank]."""
    if RANK_MAJOR:
        pointer += (rank * stride)[None, :] + k[:, None]
    else:
        pointer += (k * stride)[:, None] + rank[None, :]
    if EVEN_R and EVEN_K:
        return tl.load(pointer)
    inside = (rank < R)[None, :] & (k < K)[:, None]
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def project(x, factors, m, sx, strides, K, low, high, rows, seed, threshold,
            RANK_MAJOR: tl.constexpr, DROPOUT: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr,
            PRECISION: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """x · factorᵢ over k in [low, high), for every factor and every part of the rank: a tuple of [BM, PARTS[j]]."""
    rk = tl.arange(0, BK)
    accs = ()
    for _ in tl.static_range(len(factors)):
        for j in tl.static_range(len(PARTS)):
            accs = accs + (tl.zeros((BM, PARTS[j]), tl.float32),)
    for start in range(low, high, BK):
        k = start + rk
        if EVEN_K:
            xx = tl.load(x + (m * sx)[:, None] + k[None, :])
        else:
            xx = tl.load(x + (m * sx)[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        if DROPOUT:
            xx = tl.where(keep_mask(seed, threshold, rows, k), xx, 0.0)
        new = ()
        for i in tl.static_range(len(factors)):
            for j in tl.static_range(len(PARTS)):
                rank = (PARTS[0] if j == 1 else 0) + tl.arange(0, PARTS[j])
                block = load_factor(factors[i], strides[i], rank, k, R, K, EVEN_R, EVEN_K, RANK_MAJOR)
                new = new + (tl.dot(xx, block, accs[i * len(PARTS) + j], input_precision=PRECISION),)
        accs = new
    return accs


@triton.jit
def combine(accs, own, counters, slot, split, SPLITS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr):
    """The sums over all splits, in index order, and whether this program holds them: the last of its row block does."""
    offset = 0
    for i in tl.static_range(len(accs)):
        width: tl.constexpr = PARTS[i % len(PARTS)]
        places = tl.arange(0, BM)[:, None] * width + tl.arange(0, width)[None, :]
        tl.store(own + split * SIZE + offset + places, accs[i])
        offset += BM * width
    last = arrive(counters, slot, SPLITS)
    if last:
        sums, offset = (), 0
        for i in tl.static_range(len(accs)):
            width: tl.constexpr = PARTS[i % len(PARTS)]
            places = tl.arange(0, BM)[:, None] * width + tl.arange(0, width)[None, :]
            sums = sums + (ordered_sum(own, offset + places, SIZE, SPLITS, accs[i]),)
            offset += BM * width
        accs = sums
    return accs, last


@triton.jit
def rounded(accs, first, dtype: tl.constexpr, R: tl.constexpr, EVEN_R: tl.constexpr, PARTS: tl.constexpr):
    """One member's parts in x's dtype, with zeros beyond R (where a padded 0 may have met an infinity)."""
    parts = ()
    for j in tl.static_range(len(PARTS)):
        part = accs[first + j].to(dtype)
        if not EVEN_R:
            rank = (PARTS[0] if j == 1 else 0) + tl.arange(0, PARTS[j])
            part = tl.where((rank < R)[None, :], part, 0.0)
        parts = parts + (part,)
    return parts


@triton.jit
def store_parts(pointer, parts, keep, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Store a member's parts at rows `pointer`, as far as WIDTH."""
    for j in tl.static_range(len(PARTS)):
        rank = (PARTS[0] if j == 1 else 0) + tl.arange(0, PARTS[j])
        tl.store(pointer[:, None] + rank[None, :], parts[j], mask=keep[:, None] & (rank < WIDTH)[None, :])


@triton.jit
def times_core(pointer, parts, core, scale, keep, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
               R: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """Store s · parts · R (or Rᵀ) at rows `pointer`; R stays fp32 (its products are tf32 for a 16-bit x)."""
    for column in range(0, RP, BJ):
        j = column + tl.arange(0, BJ)
        acc = tl.zeros((BM, BJ), tl.float32)
        for p in tl.static_range(len(PARTS)):
            i = (PARTS[0] if p == 1 else 0) + tl.arange(0, PARTS[p])
            block = core + (i[:, None] + (j * R)[None, :] if TRANSPOSED else (i * R)[:, None] + j[None, :])
            block = tl.load(block, mask=(i < R)[:, None] & (j < R)[None, :], other=0.0)
            acc = tl.dot(parts[p].to(tl.float32), block, acc, input_precision=PRECISION)
        tl.store(pointer[:, None] + j[None, :], (acc * scale).to(pointer.dtype.element_ty), mask=keep[:, None])


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def prep_forward(
    x, factors, cores, us, v,
    partial, counters,
    M, K,
    sx, sf, sv,
    scales, seed, threshold,
    DROPOUT: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """u_i = x A_iᵀ [M, R] and v_i = s_i·u_i R_iᵀ for every member: x [M, K], A_i [R, K], R_i [R, R], v [M, members·RP]."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    rm = row * BM + tl.arange(0, BM)
    keep = rm < M
    m = tl.max_contiguous(tl.multiple_of(tl.where(keep, rm, 0), BM), BM)
    if WIDE:
        m, rm = m.to(tl.int64), rm.to(tl.int64)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    accs = project(x, factors, m, sx, sf, K, split * share, min(split * share + share, K), rm, seed, threshold,
                   True, DROPOUT, EVEN_R, EVEN_K, PRECISION, R, PARTS, BM, BK)  # fmt: skip
    last = True
    if SPLITS > 1:
        size: tl.constexpr = BM * RP * len(factors)
        accs, last = combine(accs, partial + row.to(tl.int64) * SPLITS * size, counters, row, split, SPLITS, PARTS, BM, size)
    if last:
        for i in tl.static_range(len(factors)):
            parts = rounded(accs, i * len(PARTS), v.dtype.element_ty, R, EVEN_R, PARTS)
            store_parts(us[i] + rm * R, parts, keep, R, PARTS)
            times_core(v + rm * sv + i * RP, parts, cores[i], scales[i], keep, True, CORE_PRECISION, R, PARTS, RP, BM, BJ)


@triton.jit(do_not_specialize=["M"])
def prep_backward(
    dys, factors, cores, t, w,
    partial, counters,
    M, Ks,
    sdy, sf, sw,
    scales,
    NEED_DX: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """t_i = dy_i B_i and w_i = s_i·t_i R_i, one member a program: dy_i [M, K_i], B_i [K_i, R], t and w [M, members·RP]."""
    pid = tl.program_id(0)
    slot, split = pid // SPLITS, pid % SPLITS
    row, member = slot // len(factors), slot % len(factors)
    rm = row * BM + tl.arange(0, BM)
    keep = rm < M
    m = tl.max_contiguous(tl.multiple_of(tl.where(keep, rm, 0), BM), BM)
    if WIDE:
        m, rm = m.to(tl.int64), rm.to(tl.int64)
    K = pick(Ks, member)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    accs = project(pick(dys, member), (pick(factors, member),), m, pick(sdy, member), (pick(sf, member),), K,
                   split * share, min(split * share + share, K), rm, 0, 0.0,
                   False, False, EVEN_R, EVEN_K, PRECISION, R, PARTS, BM, BK)  # fmt: skip
    last = True
    if SPLITS > 1:
        size: tl.constexpr = BM * RP
        accs, last = combine(accs, partial + slot.to(tl.int64) * SPLITS * size, counters, slot, split, SPLITS, PARTS, BM, size)
    if last:
        parts = rounded(accs, 0, w.dtype.element_ty, R, EVEN_R, PARTS)
        place = rm * sw + member * RP
        store_parts(t + place, parts, keep, RP, PARTS)
        if NEED_DX:
            core, scale = pick(cores, member), pick(scales, member)
            times_core(w + place, parts, core, scale, keep, False, CORE_PRECISION, R, PARTS, RP, BM, BJ)
