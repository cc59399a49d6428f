"""From tensors to calls of `extended_gemm`: grids, workspaces, strides, flags, and dummies for what is not used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .block_sizes import CORE_BLOCK, CORE_CHUNK, CORE_STEP, GemmConfig, cdiv, gemm_splits
from .extended_gemm import extended_gemm
from .launcher import Launch
from .operands import Arguments, Mask, Members, allocate_workspace, kernel_biases, needs_int64, precision, unit_rows
from .plan import LaunchPlan

VECTOR = 16  # elements: the longest vector that is loaded, and more


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
    return Launch(extended_gemm, tiles * splits, arguments, config)


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
    # masked terms have K loops of their own, which are not split
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
    return Launch(extended_gemm, core_tiles * chunks + tiles * splits, arguments, config)


def _tiles(
    M: int, Ns: Sequence[int], lengths: Sequence[int], config: GemmConfig, split: bool = True
) -> tuple[int, int]:
    """Number of tiles of the outputs, and of programs that share one."""
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
        # forward, columns of y are rows of W and B
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
    """EVEN_K, and the plan's blocks as they compile without spills: 64 x 128 for few ranks of one layer."""
    even = all(k % plan.gemm.block_k == 0 for k in (*Ks, r))
    return even, plan.gemm.fitted(even, dropout, len(Ks) == 1 and r < 128, add)
