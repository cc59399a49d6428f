"""The extended GEMM: y = [x|v] [W|B]ᵀ + bias forward, dx = [dy|w] [W;A] backward, in one K loop.

The last steps of the K loop read v and B (backward w and A) where the first read x and W, so that the adapter is
added in the fp32 accumulators and no output is read again. A group's members lie side by side in the output (forward:
y_i = [x|v_i] [W_i|B_i]ᵀ), or one after another in the reduction (backward: dx = Σ_i [dy_i|w_i] [W_i;A_i], written
once). Backward, the first programs of the grid compute dR_i = s_i·t_iᵀ u_i, independently of the others.

With OVERLAPS, the launch may begin before the previous one, of the thin products, has ended (programmatic dependent
launch): its programs reduce the base's steps, wait, and continue with v. The order of the sums is the same.

Arguments of `extended_gemm`. A plural name is a tuple, and so is a stride marked *: one entry per member, but for xs
(forward) and ys (backward), which are shared by all members and have one. Strides are of rows, in elements; the last
dimension is contiguous.

                     forward                            backward
  base operands
    xs               (x [M, K],)                        dy_i [M, K_i]
    weights          W_i [N_i, K]                       W_i [K_i, N]
  adapter operands
    v                v_i [M, R_PADDED], side by side    w_i [M, R_PADDED], side by side
    factors          B_i [N_i, R]                       A_i [R, N]
  outputs
    biases           bias_i [N_i] if HAS_BIAS           unused
    ys               y_i [M, N_i]                       (dx [M, N],)
  core gradient
    t                unused                             t_i [M, R_PADDED], side by side
    us               unused                             u_i [M, R], contiguous
    dcores           unused                             dR_i [R, R], contiguous
  workspace          partial: fp32 blocks of the core gradient (if CORE_SPLIT), then of the tiles (if SPLIT)
                     counters: int32, one per tile of either kind, zero between launches
  sizes              M rows; Ns: N_i, or (N,); Ks: (K,), or K_i; K is 0 without a weight
                     core_programs: programs of the core gradient, 0 if there is none
  strides            stride_x*, stride_w*, stride_v (of t, too), stride_factor*, stride_y*, stride_u
  scalars            scales: s_i, for dR; of dropout: seeds*, and threshold
  flags              BACKWARD, HAS_BIAS, DROPOUT
                     ADD: with DROPOUT, add the adapters' masked terms to dx, and leave the base out
                     EVEN_K: every K and R is a multiple of BLOCK_K, so that no load is masked
                     EVEN_N: backward, N is a multiple of 16: no vector of columns crosses the end
                     WIDE: offsets need 64 bits
                     OVERLAPS: the previous launch may still write v, t and the workspace
                     PRECISION: of tl.dot, "tf32" or "ieee"
  rank               R; R_PADDED: columns of a member in v, w and t
  blocks             BLOCK_M x BLOCK_N of an output per program, BLOCK_K of the reduction per step
                     GROUP_M: row blocks that share a sweep over the columns; SPLIT: `splits` programs share a tile
  blocks of dR       CORE_CHUNK_M rows per program; CORE_SPLIT: `core_chunks` programs share a tile
                     CORE_BLOCK_R x CORE_BLOCK_R of dR per tile, CORE_BLOCK_M rows per step

One kernel serves both directions, as both are the same loop; BACKWARD is a constant, so that neither contains the code
of the other. An argument that a direction does not use is a dummy: any tensor at hand, which no program dereferences.
So are biases without HAS_BIAS, dcores and us with core_programs = 0, and ys with a grid of only core programs.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..compat.triton import may_overlap
from .block_sizes import CORE_BLOCK, CORE_CHUNK, CORE_STEP, GemmConfig, cdiv, gemm_splits
from .device_functions import Reduction, accumulate, chain, gdc_wait, keep_mask, pick, sum_of_shares
from .launcher import Launch
from .operands import Arguments, Mask, Members, allocate_workspace, kernel_biases, needs_int64, precision, unit_rows
from .plan import LaunchPlan

VECTOR = 16  # elements: at least the longest vector that is loaded
# Rows of a chunk, whether a tile has several chunks, side of a tile, rows of a step, precision, ranks.
CoreBlocks = namedtuple("CoreBlocks", "CHUNK_M SPLIT BLOCK_R BLOCK_M PRECISION R R_PADDED")


@triton.jit
def tile_coordinates(pid, M, Ns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row block, column block, member and slot of a tile.

    Programs run down GROUP_M row blocks before they move to the next columns, so that programs in flight share rows of
    x and columns of W in L2. The column blocks of all members count as one row of tiles.
    """
    columns, member, start, edge = 0, 0, 0, 0
    for i in tl.static_range(len(Ns)):
        columns += tl.cdiv(Ns[i], BLOCK_N)
    first = pid // (GROUP_M * columns) * GROUP_M
    height = min(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    row, column = first + pid % (GROUP_M * columns) % height, pid % (GROUP_M * columns) // height
    for i in tl.static_range(1, len(Ns)):
        edge += tl.cdiv(Ns[i - 1], BLOCK_N)
        member, start = tl.where(column >= edge, i, member), tl.where(column >= edge, edge, start)
    return row, column - start, member, row * columns + column


@triton.jit
def tile_operands(base, adapter, member, K_MAJOR: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr):
    """Operands that `accumulate` reduces for a tile: the base's and the adapter's. K_MAJOR: forward."""
    xs, weights, Ks, stride_x, stride_w = base
    v, factors, stride_v, stride_factor = adapter
    if K_MAJOR:  # one reduction, the members' outputs side by side
        base_operands = (xs, (pick(weights, member),), stride_x, (pick(stride_w, member),), Ks)
        left, factor = (v + member * R_PADDED,), (pick(factors, member),)
        adapter_operands = (left, factor, (stride_v,), (pick(stride_factor, member),), (R,))
    else:  # one output, the members' reductions in a row
        base_operands = (xs, weights, stride_x, stride_w, Ks)
        lefts, strides, ranks = (v,), (stride_v,), (R,)
        for i in tl.static_range(1, len(factors)):
            lefts = lefts + (v + i * R_PADDED,)
            strides, ranks = strides + (stride_v,), ranks + (R,)
        adapter_operands = (lefts, factors, strides, stride_factor, ranks)
    return base_operands, adapter_operands


@triton.jit
def steps_of(lengths, BLOCK_K: tl.constexpr):
    """Steps of chained reductions, each rounded up to whole ones."""
    steps = 0
    for i in tl.static_range(len(lengths)):
        steps += tl.cdiv(lengths[i], BLOCK_K)
    return steps


@triton.jit
def masked_terms(acc, operands, m, n, mask, reduction):
    """acc + Σ_i mask_i ∘ (left_i right_i): dropout's masks apply to the adapters' terms alone.

    mask: (seeds, threshold, rows, first column).
    """
    lefts, rights, left_strides, right_strides, lengths = operands
    seeds, threshold, rows, first = mask
    for i in tl.static_range(len(lefts)):
        one = ((lefts[i],), (rights[i],), (left_strides[i],), (right_strides[i],), (lengths[i],))
        steps = (0, tl.cdiv(lengths[i], reduction.BLOCK_K))
        term = accumulate(tl.zeros_like(acc), one, steps, m, n, reduction)
        seed = seeds[i]  # a tensor even for a seed of 1, which Triton makes a constant inside a tuple
        acc += tl.where(keep_mask(seed, threshold, rows, first, acc.shape[1]), term, 0.0)
    return acc


@triton.jit
def core_gradient(pid, operands, workspace, M, strides, blocks):
    """One tile of dR_i = s_i·t_iᵀ u_i, over one of the chunks of rows; the last chunk to finish adds them up in order.

    dR is small and M is long: with one program per tile, programs would be few and slow, so rows are cut into chunks,
    one program each.
    operands: (t, us, dcores, scales); workspace: (partial, counters, chunks); strides: (stride_t, stride_u).
    The grid's fastest index is the chunk, then the tile, then the member. A slot is a tile of a member.
    """
    t, us, dcores, scales = operands
    partial, counters, chunks = workspace
    stride_t, stride_u = strides
    SIDE: tl.constexpr = (blocks.R_PADDED + blocks.BLOCK_R - 1) // blocks.BLOCK_R  # tiles along each dimension of dR
    slot, chunk = (pid // chunks, pid % chunks) if blocks.SPLIT else (pid, 0)
    member, tile = slot // (SIDE * SIDE), slot % (SIDE * SIDE)
    i = tile // SIDE * blocks.BLOCK_R + tl.arange(0, blocks.BLOCK_R)
    j = tile % SIDE * blocks.BLOCK_R + tl.arange(0, blocks.BLOCK_R)
    left, right = t + member * blocks.R_PADDED, pick(us, member)
    acc = tl.zeros((blocks.BLOCK_R, blocks.BLOCK_R), tl.float32)
    for row in range(chunk * blocks.CHUNK_M, min(chunk * blocks.CHUNK_M + blocks.CHUNK_M, M), blocks.BLOCK_M):
        m = row + tl.arange(0, blocks.BLOCK_M)
        # indexed as tᵀ: a transposed view of a load would keep it out of the pipeline's prefetch
        lhs = tl.load(
            left + (m.to(tl.int64) * stride_t)[None, :] + i[:, None],
            mask=(m[None, :] < M) & (i[:, None] < blocks.R),
            other=0.0,
        )
        rhs = tl.load(
            right + (m.to(tl.int64) * stride_u)[:, None] + j[None, :],
            mask=(m[:, None] < M) & (j[None, :] < blocks.R),
            other=0.0,
        )
        acc = tl.dot(lhs, rhs, acc, input_precision=blocks.PRECISION)
    last, acc = sum_of_shares(acc, chunk, (partial, counters, slot, chunks), blocks.SPLIT, False)
    if last:
        inside = (i[:, None] < blocks.R) & (j[None, :] < blocks.R)
        tl.store(pick(dcores, member) + i[:, None] * blocks.R + j[None, :], acc * pick(scales, member), mask=inside)


@triton.jit(do_not_specialize=["M", "splits", "core_programs", "core_chunks", "seeds", "threshold"])
def extended_gemm(
    xs, weights, v, factors, biases, ys,  # base operands, adapter operands, outputs
    t, us, dcores, partial, counters, splits,  # core gradient, workspace
    M, Ns, Ks, core_programs, core_chunks,  # sizes
    stride_x, stride_w, stride_v, stride_factor, stride_y, stride_u,  # strides
    scales, seeds, threshold,  # scalars
    # flags
    BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ADD: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, R_PADDED: tl.constexpr,  # rank
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPLIT: tl.constexpr,
    # blocks of the core gradient
    CORE_CHUNK_M: tl.constexpr, CORE_SPLIT: tl.constexpr, CORE_BLOCK_R: tl.constexpr, CORE_BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y_i = [x|v_i] [W_i|B_i]ᵀ + bias_i (forward), or dx = Σ_i [dy_i|w_i] [W_i;A_i] and dR_i = s_i·t_iᵀ u_i (backward).

    Grid: core_programs programs of dR, then `splits` programs for each output tile; the splits of a tile are neighbors.
    """
    pid = tl.program_id(0)
    if BACKWARD:
        if pid < core_programs:
            if OVERLAPS:
                gdc_wait()
            core_gradient(
                pid,
                (t, us, dcores, scales),
                (partial, counters, core_chunks),
                M,
                (stride_v, stride_u),
                CoreBlocks(CORE_CHUNK_M, CORE_SPLIT, CORE_BLOCK_R, CORE_BLOCK_M, PRECISION, R, R_PADDED),
            )
            return
        if SPLIT:  # the core gradient's part of the workspace comes first
            counters += core_programs // core_chunks
            partial += core_programs * CORE_BLOCK_R * CORE_BLOCK_R
    pid -= core_programs
    reduction: tl.constexpr = Reduction(not BACKWARD, EVEN_K, PRECISION, BLOCK_K)  # W and B end in K forward
    tile, split = (pid // splits, pid % splits) if SPLIT else (pid, 0)
    row, column, member, slot = tile_coordinates(tile, M, Ns, BLOCK_M, BLOCK_N, GROUP_M)
    N = pick(Ns, member)
    rm, rn = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end are clamped to 0, not masked: that costs no registers, and they are not stored. The
    # select hides that a block is contiguous and aligned; the hints restore that, for vectorized loads. Past the end
    # they are false, but there it does not matter what is loaded, as long as no vector of columns straddles the end.
    m = tl.max_contiguous(tl.multiple_of(tl.where(rm < M, rm, 0), BLOCK_M), BLOCK_M)
    n = tl.where(rn < N, rn, 0)
    if EVEN_N:
        n = tl.max_contiguous(tl.multiple_of(n, BLOCK_N), BLOCK_N)
    if WIDE:
        m, n = m.to(tl.int64), n.to(tl.int64)
    base, adapter = (xs, weights, Ks, stride_x, stride_w), (v, factors, stride_v, stride_factor)
    base_operands, adapter_operands = tile_operands(base, adapter, member, not BACKWARD, R, R_PADDED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    base_steps, adapter_steps = steps_of(Ks, BLOCK_K), len(adapter_operands[4]) * tl.cdiv(R, BLOCK_K)
    if DROPOUT:
        acc = masked_terms(acc, adapter_operands, m, n, (seeds, threshold, rm, column * BLOCK_N), reduction)
        if not ADD:
            acc = accumulate(acc, base_operands, (0, base_steps), m, n, reduction)
    else:
        steps = base_steps + adapter_steps
        steps_a_split = tl.cdiv(steps, splits) if SPLIT else steps
        low = split * steps_a_split
        high = min(low + steps_a_split, steps)
        if OVERLAPS:  # no load of v may move up into the base's loop
            acc = accumulate(acc, base_operands, (low, min(high, base_steps)), m, n, reduction)
            gdc_wait()
            adapter_range = (max(low - base_steps, 0), high - base_steps)
            acc = accumulate(acc, adapter_operands, adapter_range, m, n, reduction)
        else:
            acc = accumulate(acc, chain(base_operands, adapter_operands), (low, high), m, n, reduction)
    last, acc = sum_of_shares(acc, split, (partial, counters, slot, splits), SPLIT, True)
    if last:  # epilogue: the bias in fp32 once all splits are added, then the one rounding to the output's dtype
        if HAS_BIAS:
            # masked: because of the hints on n, a vector load could read past the end of the bias
            acc += tl.load(pick(biases, member) + rn, mask=rn < N, other=0.0)[None, :].to(tl.float32)
        y, row_offsets = pick(ys, member), (rm.to(tl.int64) if WIDE else rm) * pick(stride_y, member)
        y += row_offsets[:, None] + rn[None, :]
        inside = (rm[:, None] < M) & (rn[None, :] < N)
        if ADD:
            acc += tl.load(y, mask=inside, other=0.0).to(tl.float32)
        tl.store(y, acc.to(y.dtype.element_ty), mask=inside)


def forward_call(x: Tensor, members: Members, v: Tensor, ys: list[Tensor], plan: LaunchPlan) -> Launch:
    """y_i = x W_iᵀ + v_i B_iᵀ + bias_i of all members."""
    M, Ns = x.shape[0], tuple(y.shape[1] for y in ys)
    weights, Ks = _weights(members, x)
    even, config = _fitted_config(plan, Ks, members.r, False, False)
    tiles, splits = _tiles(M, Ns, (*Ks, members.r), config)
    partial, counters = allocate_workspace(x, tiles * splits * config.block_m * config.block_n, tiles, splits)
    has_bias, biases = kernel_biases(members.biases, ys)
    arguments = dict(
        xs=(x,),
        weights=weights,
        v=v,
        factors=tuple(unit_rows(b) for b in members.b),
        biases=biases,
        ys=tuple(ys),
        t=v,  # dummies, down to dcores: forward has no core gradient
        us=(v,),
        dcores=(partial,),
        partial=partial,
        counters=counters,
        M=M,
        Ns=Ns,
        Ks=Ks,
        core_programs=0,
        BACKWARD=False,
        HAS_BIAS=has_bias,
        **Mask().arguments,
        ADD=False,
        EVEN_K=even,
        splits=splits,
        core_chunks=1,
    )
    arguments |= _common_arguments(arguments, members, config)
    return _launch(tiles * splits, arguments, config, plan)


def backward_call(
    dys: Sequence[Tensor],
    members: Members,
    us: Sequence[Tensor],
    t: Tensor,
    w: Tensor,
    dx: Tensor | None,
    dcores: list[Tensor],
    plan: LaunchPlan,
    mask: Mask,
    add: bool = False,  # with dropout: dx holds Σ_i dy_i W_i, and Σ_i mask_i ∘ (w_i A_i) is added to it
) -> Launch:
    """dx = Σ_i dy_i W_i + w_i A_i unless it is None, and dR_i = s_i·t_iᵀ u_i into `dcores` unless that is empty."""
    M, dropout = t.shape[0], mask.dropout > 0.0
    weights, Ks = _weights(members if dx is not None and not add else None, *dys)
    even, config = _fitted_config(plan, Ks, members.r, dropout, add)
    columns = () if dx is None else (dx.shape[1],)
    # masked terms have separate K loops, which are not split
    tiles, splits = _tiles(M, columns, (*Ks, *[members.r] * len(Ks)), config, split=not dropout)
    chunks, core_tiles = cdiv(M, CORE_CHUNK), len(dcores) * cdiv(members.width, CORE_BLOCK) ** 2
    size = core_tiles * chunks * CORE_BLOCK**2 + (tiles * splits * config.block_m * config.block_n if splits > 1 else 0)
    partial, counters = allocate_workspace(t, size, core_tiles + tiles, max(splits, chunks))
    # one workspace: dR's blocks first, then the tiles'; without dx, t stands in for an output that no program writes
    output = dx if dx is not None else t
    arguments = dict(
        xs=tuple(dys),
        weights=weights,
        v=w,
        factors=tuple(unit_rows(a) for a in members.a),
        biases=(output,),  # a dummy: HAS_BIAS is False
        ys=(output,),
        t=t,
        us=tuple(us) if dcores else (t,),
        dcores=tuple(dcores) or (partial,),
        partial=partial,
        counters=counters,
        M=M,
        Ns=(output.shape[1],),
        Ks=Ks,
        core_programs=core_tiles * chunks,
        BACKWARD=True,
        HAS_BIAS=False,
        **mask.arguments,
        ADD=add,
        EVEN_K=even,
        splits=splits,
        core_chunks=chunks,
    )
    arguments |= _common_arguments(arguments, members, config)
    return _launch(core_tiles * chunks + tiles * splits, arguments, config, plan)


def _launch(grid: int, arguments: Arguments, config: GemmConfig, plan: LaunchPlan) -> Launch:
    """A launch that overlaps the previous one if the plan says so; not without a base, and not with masks."""
    overlaps = plan.overlaps and plan.path == "fused" and sum(arguments["Ks"]) > 0
    overlaps = overlaps and not arguments["DROPOUT"] and may_overlap(extended_gemm)
    return Launch(extended_gemm, grid, arguments | {"OVERLAPS": overlaps}, config, overlaps=overlaps)


def _tiles(
    M: int, Ns: Sequence[int], lengths: Sequence[int], config: GemmConfig, split: bool = True
) -> tuple[int, int]:
    """Return the number of output tiles, and of programs that share one."""
    tiles = cdiv(M, config.block_m) * sum(cdiv(N, config.block_n) for N in Ns)
    steps = sum(cdiv(length, config.block_k) for length in lengths)
    return tiles, gemm_splits(tiles, steps, M) if tiles and split else 1


def _common_arguments(arguments: Arguments, members: Members, config: GemmConfig) -> Arguments:
    """Strides, flags and blocks, the same in both directions."""
    xs, ys, weights, factors, v = (arguments[name] for name in ("xs", "ys", "weights", "factors", "v"))
    return dict(
        stride_x=tuple(x.stride(0) for x in xs),
        stride_w=tuple(w.stride(0) for w in weights),
        stride_v=v.stride(0),
        stride_factor=tuple(f.stride(0) for f in factors),
        stride_y=tuple(y.stride(0) for y in ys),
        stride_u=members.r,
        scales=tuple(members.scales),
        SPLIT=arguments["splits"] > 1,
        CORE_SPLIT=arguments["core_chunks"] > 1,
        # always true forward, where columns of y are rows of W and B
        EVEN_N=not arguments["BACKWARD"] or arguments["Ns"][0] % VECTOR == 0,
        WIDE=needs_int64(*xs, *ys, *weights, *factors, v),
        PRECISION=precision(v.dtype),
        R=members.r,
        R_PADDED=members.width,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group,
        CORE_CHUNK_M=CORE_CHUNK,
        CORE_BLOCK_R=CORE_BLOCK,
        CORE_BLOCK_M=CORE_STEP,
    )


def _weights(members: Members | None, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The weights with contiguous rows, and the lengths of the base reductions: 0 for the dummy of a missing weight."""
    if members is None:  # dummies, which no program reads
        return inputs, tuple(x.shape[1] for x in inputs)
    if members.weights[0] is None:
        return tuple(inputs[0] for _ in members.weights), tuple(0 for _ in inputs)
    return tuple(unit_rows(w) for w in members.weights if w is not None), tuple(x.shape[1] for x in inputs)


def _fitted_config(plan: LaunchPlan, Ks: Sequence[int], r: int, dropout: bool, add: bool) -> tuple[bool, GemmConfig]:
    """Return EVEN_K, and the plan's blocks, fitted to compile without spills: 64 x 128 for few ranks of one layer."""
    even = all(k % plan.gemm.block_k == 0 for k in (*Ks, r))
    return even, plan.gemm.fitted(even, dropout, len(Ks) == 1 and r < 128, add)
