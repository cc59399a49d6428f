"""The thin products before the extended GEMM: u = x Aᵀ, v = s·u Rᵀ forward; t = dy B, w = s·t R backward.

x (dy) is read once, for all members of a group. R is read as fp32 whatever x's dtype. A rank is covered by one or
two powers of two (96 = 64 + 32), so that little of the work is padding. The reduction is split by the shape alone; the
last program of a row block to come adds the fp32 sums of all in their order and does the r x r product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import arrive, keep_mask, ordered_sum, pick, places


@triton.jit
def part_ranks(PARTS: tl.constexpr, part: tl.constexpr):
    """The ranks that a part covers: [0, PARTS[0]), or [PARTS[0], PARTS[0] + PARTS[1])."""
    return (PARTS[0] if part == 1 else 0) + tl.arange(0, PARTS[part])


@triton.jit
def project(x, factors, m, k_stride, K, low, high, rows, seed, threshold,
            DROPOUT: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
            R: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """x [rows at m, K] · factors over k in [low, high), for each part of each rank: a tuple of [BM, part]."""
    rk = tl.arange(0, BK)
    accs = ()
    for i in tl.static_range(len(factors)):
        accs = accs + (tl.zeros((BM, PARTS[i % len(PARTS)]), tl.float32),)
    for start in range(low, high, BK):
        k = start + rk
        if EVEN_K:
            xx = tl.load(x + m[:, None] + k[None, :])
        else:
            xx = tl.load(x + m[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        if DROPOUT:
            xx = tl.where(keep_mask(seed, threshold, rows, k), xx, 0.0)
        new = ()
        for i in tl.static_range(len(factors)):
            block = factors[i][None, :] + (k * k_stride)[:, None]
            if EVEN_R and EVEN_K:
                block = tl.load(block)
            else:
                inside = (part_ranks(PARTS, i % len(PARTS)) < R)[None, :] & (k < K)[:, None]
                block = tl.load(block, mask=inside, other=0.0)
            new = new + (tl.dot(xx, block, accs[i], input_precision=PRECISION),)
        accs = new
    return accs


@triton.jit
def store_sums(accs, outputs, m, keep, own, counters, slot, split, R: tl.constexpr, PARTS: tl.constexpr,
               BM: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Store the sums of all splits at `outputs` (columns) + m (rows); whether this program was the one to do it."""
    last = True
    if SPLITS > 1:
        offset = 0
        for i in tl.static_range(len(accs)):
            tl.store(own + split * SIZE + offset + places(BM, PARTS[i % len(PARTS)]), accs[i])
            offset += BM * PARTS[i % len(PARTS)]
        last = arrive(counters, slot, SPLITS)
    if last:
        offset = 0
        for i in tl.static_range(len(accs)):
            part = accs[i]
            if SPLITS > 1:
                part = ordered_sum(own + offset, places(BM, PARTS[i % len(PARTS)]), SIZE, SPLITS, part)
            output = outputs[i][None, :] + m[:, None]
            inside = keep[:, None] & (part_ranks(PARTS, i % len(PARTS)) < R)[None, :]
            tl.store(output, part.to(output.dtype.element_ty), mask=inside)
            offset += BM * PARTS[i % len(PARTS)]
        tl.debug_barrier()  # what other threads stored is read next
    return last


@triton.jit
def times_core(source, target, core, scale, keep, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
               R: tl.constexpr, PARTS: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """target rows [RP] = s · source rows [R] · R (or Rᵀ); R stays fp32 (its products are tf32 for a 16-bit x)."""
    parts = ()
    for p in tl.static_range(len(PARTS)):
        i = part_ranks(PARTS, p)
        part = tl.load(source[:, None] + i[None, :], mask=keep[:, None] & (i < R)[None, :], other=0.0)
        parts = parts + (part.to(tl.float32),)
    for column in tl.range(0, RP, BJ, num_stages=2):
        j = column + tl.arange(0, BJ)
        acc = tl.zeros((BM, BJ), tl.float32)
        for p in tl.static_range(len(PARTS)):
            i = part_ranks(PARTS, p)
            block = core + (i[:, None] + (j * R)[None, :] if TRANSPOSED else (i * R)[:, None] + j[None, :])
            block = tl.load(block, mask=(i < R)[:, None] & (j < R)[None, :], other=0.0).to(tl.float32)
            acc = tl.dot(parts[p], block, acc, input_precision=PRECISION)
        tl.store(target[:, None] + j[None, :], (acc * scale).to(target.dtype.element_ty), mask=keep[:, None])


@triton.jit
def forward_rows(pid, x, factors, cores, us, v, partial, counters, M, K, sx, sf, sv, scales, seed, threshold,
                 DROPOUT: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
                 PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
                 RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
                 SPLITS: tl.constexpr):  # fmt: skip
    """What one program of `prep_forward` does."""
    row, split = pid // SPLITS, pid % SPLITS
    rm = row * BM + tl.arange(0, BM)
    keep = rm < M
    m = tl.max_contiguous(tl.multiple_of(tl.where(keep, rm, 0), BM), BM)
    if WIDE:
        m, rm = m.to(tl.int64), rm.to(tl.int64)
    columns, outputs = (), ()
    for i in tl.static_range(len(us)):
        for j in tl.static_range(len(PARTS)):
            columns = columns + (factors[i] + part_ranks(PARTS, j) * sf[i],)
            outputs = outputs + (us[i] + part_ranks(PARTS, j),)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    accs = project(x, columns, m * sx, 1, K, split * share, min(split * share + share, K), rm, seed, threshold,
                   DROPOUT, EVEN_R, EVEN_K, PRECISION, R, PARTS, BM, BK)  # fmt: skip
    size: tl.constexpr = BM * RP * len(us)
    own = partial + row.to(tl.int64) * SPLITS * size
    if store_sums(accs, outputs, rm * R, keep, own, counters, row, split, R, PARTS, BM, SPLITS, size):
        for member in range(len(us)):
            times_core(pick(us, member) + rm * R, v + rm * sv + member * RP, pick(cores, member), pick(scales, member),
                       keep, True, CORE_PRECISION, R, PARTS, RP, BM, BJ)  # fmt: skip


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
    """u_i = x A_iᵀ [M, R] and v_i = s_i·u_i R_iᵀ of all members: x [M, K], A_i [R, K], R_i [R, R], v [M, all·RP]."""
    forward_rows(tl.program_id(0), x, factors, cores, us, v, partial, counters, M, K, sx, sf, sv, scales, seed,
                 threshold, DROPOUT, EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION, R, PARTS, RP, BM, BK, BJ,
                 SPLITS)  # fmt: skip


@triton.jit
def backward_rows(pid, dys, factors, cores, t, w, partial, counters, M, Ks, sdy, sf, sw, scales,
                  NEED_DX: tl.constexpr, EVEN_R: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
                  PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
                  RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
                 SPLITS: tl.constexpr):  # fmt: skip
    """What one program of `prep_backward` does."""
    slot, split = pid // SPLITS, pid % SPLITS
    row, member = slot // len(factors), slot % len(factors)
    rm = row * BM + tl.arange(0, BM)
    keep = rm < M
    m = tl.max_contiguous(tl.multiple_of(tl.where(keep, rm, 0), BM), BM)
    K, k_stride, factor = pick(Ks, member), pick(sf, member), pick(factors, member)
    if WIDE:
        m, rm, k_stride = m.to(tl.int64), rm.to(tl.int64), k_stride.to(tl.int64)
    place = rm * sw + member * RP
    columns, outputs = (), ()
    for j in tl.static_range(len(PARTS)):
        columns, outputs = columns + (factor + part_ranks(PARTS, j),), outputs + (t + part_ranks(PARTS, j),)
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    accs = project(pick(dys, member), columns, m * pick(sdy, member), k_stride, K,
                   split * share, min(split * share + share, K), rm, 0, 0.0,
                   False, EVEN_R, EVEN_K, PRECISION, R, PARTS, BM, BK)  # fmt: skip
    own = partial + slot.to(tl.int64) * SPLITS * BM * RP
    if store_sums(accs, outputs, place, keep, own, counters, slot, split, R, PARTS, BM, SPLITS, BM * RP):
        if NEED_DX:
            times_core(t + place, w + place, pick(cores, member), pick(scales, member), keep, False, CORE_PRECISION,
                       R, PARTS, RP, BM, BJ)  # fmt: skip


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
    """t_i = dy_i B_i and w_i = s_i·t_i R_i, one member a program: dy_i [M, K_i], B_i [K_i, R], t, w [M, members·RP]."""
    backward_rows(tl.program_id(0), dys, factors, cores, t, w, partial, counters, M, Ks, sdy, sf, sw, scales,
                  NEED_DX, EVEN_R, EVEN_K, WIDE, PRECISION, CORE_PRECISION, R, PARTS, RP, BM, BK, BJ,
                  SPLITS)  # fmt: skip
