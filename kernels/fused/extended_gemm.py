"""The extended GEMM: y = [x|v] [W|B]ᵀ + bias forward, dx = [dy|w] [W;A] backward, in one K loop.

The last steps of the loop walk v and B (w and A) where the first walk x and W, so the accumulators take the adapter
for free and no result is read again. A group's members lie side by side in the output (forward: y_i =
[x|v_i][W_i|B_i]ᵀ) or one after another in the reduction (backward: dx = Σ_i [dy_i|w_i][W_i;A_i], written once). In
backward the first programs sum dR_i = s_i·t_iᵀ u_i meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import arrive, keep_mask, ordered_sum, pick, places


@triton.jit
def accumulate(acc, lefts, rights, left_strides, right_strides, lengths, low, high, m, n,
               K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """acc + Σ_i left_i right_i over the steps [low, high) of the chained reductions; left_i [M, length_i]."""
    rk = tl.arange(0, BK)
    for step in range(low, high):
        left, right, length, first, edge = lefts[0], rights[0], lengths[0], 0, 0
        left_stride, right_stride = left_strides[0], right_strides[0]
        for i in tl.static_range(1, len(lefts)):
            edge += tl.cdiv(lengths[i - 1], BK)
            here = step >= edge
            left, right = tl.where(here, lefts[i], left), tl.where(here, rights[i], right)
            left_stride = tl.where(here, left_strides[i], left_stride)
            right_stride = tl.where(here, right_strides[i], right_stride)
            first, length = tl.where(here, edge, first), tl.where(here, lengths[i], length)
        k = (step - first) * BK + rk
        left += (m * left_stride)[:, None] + k[None, :]
        right += (n * right_stride)[:, None] + k[None, :] if K_MAJOR else (k * right_stride)[:, None] + n[None, :]
        if EVEN_K:
            lhs, rhs = tl.load(left), tl.load(right)
        else:
            inside = k < length
            lhs = tl.load(left, mask=inside[None, :], other=0.0)
            rhs = tl.load(right, mask=inside[None, :] if K_MAJOR else inside[:, None], other=0.0)
        acc = tl.dot(lhs, rhs.T if K_MAJOR else rhs, acc, input_precision=PRECISION)
    return acc


@triton.jit
def core_gradient(t, us, dcores, partial, counters, index, M, st, su, scales,
                  R: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
                  ROWS: tl.constexpr, CHUNKS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One [BR, BR] tile of dR = s·tᵀ u [R, R] over one of CHUNKS ranges of rows; the last range to end adds them up."""
    side: tl.constexpr = (RP + BR - 1) // BR
    slot, chunk = index // CHUNKS, index % CHUNKS
    member, tile = slot // (side * side), slot % (side * side)
    i = tile // side * BR + tl.arange(0, BR)
    j = tile % side * BR + tl.arange(0, BR)
    left, right = t + member * RP, pick(us, member)
    acc = tl.zeros((BR, BR), tl.float32)
    for row in range(chunk * ROWS, min(chunk * ROWS + ROWS, M), BK):
        m = row + tl.arange(0, BK)
        lhs = tl.load(
            left + (m.to(tl.int64) * st)[:, None] + i[None, :], mask=(m[:, None] < M) & (i[None, :] < R), other=0.0
        )
        rhs = tl.load(
            right + (m.to(tl.int64) * su)[:, None] + j[None, :], mask=(m[:, None] < M) & (j[None, :] < R), other=0.0
        )
        acc = tl.dot(lhs.T, rhs, acc, input_precision=PRECISION)
    last = True
    if CHUNKS > 1:
        offsets = places(BR, BR)
        own = partial + slot * CHUNKS * BR * BR
        tl.store(own + chunk * BR * BR + offsets, acc)
        last = arrive(counters, slot, CHUNKS)
        if last:
            acc = ordered_sum(own, offsets, BR * BR, CHUNKS, acc)
    if last:
        inside = (i[:, None] < R) & (j[None, :] < R)
        tl.store(pick(dcores, member) + i[:, None] * R + j[None, :], acc * pick(scales, member), mask=inside)


@triton.jit
def locate(pid, M, Ns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row block, column block, member and place of a tile; GROUP row blocks go down before the next columns, for L2."""
    columns, member, start, edge = 0, 0, 0, 0
    for i in tl.static_range(len(Ns)):
        columns += tl.cdiv(Ns[i], BN)
    first = pid // (GROUP * columns) * GROUP
    height = min(tl.cdiv(M, BM) - first, GROUP)
    row, column = first + pid % (GROUP * columns) % height, pid % (GROUP * columns) // height
    for i in tl.static_range(1, len(Ns)):
        edge += tl.cdiv(Ns[i - 1], BN)
        member, start = tl.where(column >= edge, i, member), tl.where(column >= edge, edge, start)
    return row, column - start, member, row * columns + column


@triton.jit
def output_tile(pid, xs, weights, v, factors, biases, ys, partial, counters,
                M, Ns, Ks, sx, sw, sv, sf, sy, seed, threshold,
                BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
                EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                SPLITS: tl.constexpr):  # fmt: skip
    """One [BM, BN] tile of an output, or one of SPLITS ranges of its reduction."""
    row, column, member, slot = locate(pid // SPLITS, M, Ns, BM, BN, GROUP)
    N = pick(Ns, member)
    rm, rn = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    # what lies past the end is clamped, not masked: that costs no registers, and it is not stored
    m = tl.max_contiguous(tl.multiple_of(tl.where(rm < M, rm, 0), BM), BM)
    n = tl.max_contiguous(tl.multiple_of(tl.where(rn < N, rn, 0), BN), BN)
    if WIDE:
        m, n = m.to(tl.int64), n.to(tl.int64)
    if BACKWARD:  # one output, the members' reductions in a row
        base, right, sbase, sright, lengths = xs, weights, sx, sw, Ks
        ext, factor, sext, sfactor, ranks = (v,), factors, (sv,), sf, (R,)
        for i in tl.static_range(1, len(factors)):
            ext, sext, ranks = ext + (v + i * RP,), sext + (sv,), ranks + (R,)
    else:  # one reduction, the members' outputs side by side
        base, right, sbase, sright, lengths = xs, (pick(weights, member),), sx, (pick(sw, member),), Ks
        ext, factor, sext, sfactor, ranks = (
            (v + member * RP,),
            (pick(factors, member),),
            (sv,),
            (pick(sf, member),),
            (R,),
        )
    acc = tl.zeros((BM, BN), tl.float32)
    base_steps, steps = 0, 0
    for i in tl.static_range(len(lengths)):
        base_steps += tl.cdiv(lengths[i], BK)
    steps = base_steps + len(ranks) * tl.cdiv(R, BK)
    if DROPOUT:  # the mask is on the adapter's part alone: dx = dy W + mask o (w A)
        acc = accumulate(
            acc, ext, factor, sext, sfactor, ranks, 0, steps - base_steps, m, n, not BACKWARD, EVEN_K, PRECISION, BK
        )
        acc = tl.where(keep_mask(seed, threshold, rm, rn), acc, 0.0)
        acc = accumulate(
            acc, base, right, sbase, sright, lengths, 0, base_steps, m, n, not BACKWARD, EVEN_K, PRECISION, BK
        )
    else:
        share = tl.cdiv(steps, SPLITS)
        low = pid % SPLITS * share
        acc = accumulate(acc, base + ext, right + factor, sbase + sext, sright + sfactor, lengths + ranks,
                         low, min(low + share, steps), m, n, not BACKWARD, EVEN_K, PRECISION, BK)  # fmt: skip
    last = True
    if SPLITS > 1:
        offsets = places(BM, BN)
        own = partial + slot.to(tl.int64) * SPLITS * BM * BN
        tl.store(own + pid % SPLITS * BM * BN + offsets, acc)
        last = arrive(counters, slot, SPLITS)
        if last:
            acc = ordered_sum(own, offsets, BM * BN, SPLITS, acc)
    if last:
        if HAS_BIAS:
            acc += tl.load(pick(biases, member) + n)[None, :].to(tl.float32)
        y, sm = pick(ys, member), (rm.to(tl.int64) if WIDE else rm) * pick(sy, member)
        tl.store(y + sm[:, None] + rn[None, :], acc.to(y.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit(do_not_specialize=["M", "core_programs", "seed", "threshold"])
def extended_gemm(
    xs, weights, v, factors, biases, ys,
    t, us, dcores, partial, counters,
    M, Ns, Ks, core_programs,
    sx, sw, sv, sf, sy, su,
    scales, seed, threshold,
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, BR: tl.constexpr, BKR: tl.constexpr,
):  # fmt: skip
    """y_i = [x|v_i] [W_i|B_i]ᵀ + bias_i (forward), or dx = Σ_i [dy_i|w_i] [W_i;A_i] and dR_i = s_i·t_iᵀ u_i (backward).

    xs: x [M, K], or dy_i [M, K_i]; weights: W_i, contiguous along K forward and along N backward; v: v_i, or w_i,
    [M, RP] side by side; factors: B_i [N_i, R], or A_i [R, N]; ys: y_i [M, N_i], or dx [M, N]; t, us: t_i side by side
    and u_i [M, R]; partial, counters: workspace of the dR tiles (CHUNKS), then of the splits (SPLITS).
    """
    pid = tl.program_id(0)
    is_tile = True
    if BACKWARD:
        is_tile = pid >= core_programs
        if not is_tile:
            core_gradient(t, us, dcores, partial, counters, pid, M, sv, su, scales,
                          R, RP, PRECISION, ROWS, CHUNKS, BR, BKR)  # fmt: skip
        if SPLITS > 1:  # the workspace of the dR tiles comes first
            counters += core_programs // CHUNKS
            partial += core_programs * BR * BR
    if is_tile:
        output_tile(pid - core_programs, xs, weights, v, factors, biases, ys, partial, counters,
                    M, Ns, Ks, sx, sw, sv, sf, sy, seed, threshold,
                    BACKWARD, HAS_BIAS, DROPOUT, EVEN_K, WIDE, PRECISION, R, RP, BM, BN, BK, GROUP, SPLITS)  # fmt: skip
