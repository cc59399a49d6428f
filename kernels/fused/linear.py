"""From tensors to launches: grids, workspaces, strides and flags. Two launches a direction, group or not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .block_sizes import (
    CORE_BLOCK,
    CORE_CHUNK,
    CORE_ROWS,
    GemmConfig,
    cdiv,
    core_chunks,
    gemm_splits,
    prep_members,
    prep_splits,
    rank_parts,
)
from .extended_gemm import extended_gemm
from .launcher import launch
from .low_rank import prep_backward, prep_forward
from .plan import Plan
from .workspace import counters

INT32_LIMIT = 2**31


@dataclass(frozen=True)
class Members:
    """Layers that read the same x [M, n]: weights W_i [m_i, n], A_i [r, n], R_i [r, r], B_i [m_i, r], scales s_i.

    All of one rank and dtype, and all with a weight or all without.
    """

    weights: Sequence[Tensor | None]
    a: Sequence[Tensor]
    cores: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]

    @property
    def r(self) -> int:
        """The rank."""
        return self.a[0].shape[0]

    @property
    def width(self) -> int:
        """Columns of a member's v, w and t: the rank, padded."""
        return sum(rank_parts(self.r))

    def of(self, part: slice) -> Members:
        """Some of the members."""
        return Members(*(field[part] for field in (self.weights, self.a, self.cores, self.b, self.scales)))


@dataclass(frozen=True)
class Mask:
    """Dropout on the adapter's x: a function of the seed and an element's place, so that nothing is stored."""

    dropout: float = 0.0
    seed: int = 0


def forward(
    x: Tensor, members: Members, biases: Sequence[Tensor | None], plan: Plan, mask: Mask = Mask()
) -> tuple[list[Tensor], list[Tensor]]:
    """y_i = x W_iᵀ + s_i·u_i R_iᵀ B_iᵀ + bias_i [M, m_i] and u_i = x A_iᵀ [M, r].

    Args:
        x: [M, n] with rows in one piece.
        members: the layers; with dropout, s_i is to hold the factor 1 / (1 - p).
        biases: [m_i] or None, for each member.
        plan: path and blocks.
        mask: dropout of the adapter's x.
    """
    M, width, together = x.shape[0], members.width, prep_members(members.r, len(members.a))
    us = [x.new_empty((M, members.r)) for _ in members.a]
    if M == 0:
        return [x.new_empty((0, b.shape[0])) for b in members.b], us
    v = x.new_empty((M, width * len(us)))
    with on_device(x):
        for i in range(0, len(us), together):
            part = slice(i, i + together)
            launch_prep(forward_arguments(x, members.of(part), us[part], v[:, i * width :], plan, mask), plan)
        return after_prep(x, members, biases, v, plan, mask), us


def after_prep(
    x: Tensor, members: Members, biases: Sequence[Tensor | None], v: Tensor, plan: Plan, mask: Mask
) -> list[Tensor]:
    """y_i = x W_iᵀ + v_i B_iᵀ + bias_i."""
    if _fused(plan, members, mask):
        ys = [x.new_empty((x.shape[0], b.shape[0])) for b in members.b]
        _extended_forward(x, members, biases, v, ys, plan)
        return ys
    vs = [v[:, i * members.width : i * members.width + members.r] for i in range(len(members.a))]
    return [_addmm(x, *parts) for parts in zip(vs, members.weights, members.b, biases, strict=True)]


def backward(
    dys: Sequence[Tensor],
    members: Members,
    us: Sequence[Tensor],
    plan: Plan,
    need_dx: bool,
    need_dcore: bool,
    mask: Mask = Mask(),
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = Σ_i dy_i W_i + s_i·dy_i B_i R_i A_i [M, n] and dR_i = s_i·(dy_i B_i)ᵀ u_i [r, r], for dy_i [M, m_i]."""
    M = dys[0].shape[0]
    dys = [unit_rows(dy) for dy in dys]
    dcores = [core.new_empty(core.shape) for core in members.cores] if need_dcore else []
    if M == 0:
        return _dx(dys, members) if need_dx else None, [dcore.zero_() for dcore in dcores]
    t = dys[0].new_empty((M, members.width * len(dys)))
    w = torch.empty_like(t) if need_dx else t
    with on_device(t):
        launch_prep(backward_arguments(dys, members, t, w, plan, need_dx), plan)
        if need_dx:
            return after_prep_backward(dys, members, us, t, w, dcores, plan, mask), dcores
        if need_dcore:
            extended_backward(dys, members, us, t, w, None, dcores, plan, mask)
    return None, dcores


def after_prep_backward(
    dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], t: Tensor, w: Tensor, dcores: list[Tensor],
    plan: Plan, mask: Mask,
) -> Tensor:  # fmt: skip
    """dx = Σ_i dy_i W_i + w_i A_i, and dR_i into `dcores`, where they are wanted."""
    dx, fused = _dx(dys, members), _fused(plan, members, mask)
    if fused or dcores:
        extended_backward(dys, members, us, t, w, dx if fused else None, dcores, plan, mask)
    if not fused:
        _addmm_backward(dys, members, w, dx)
    return dx


def _dx(dys: Sequence[Tensor], members: Members) -> Tensor:
    return dys[0].new_empty((dys[0].shape[0], members.a[0].shape[1]))


def _fused(plan: Plan, members: Members, mask: Mask) -> bool:
    """Whether the extended GEMM runs; with dropout always, as only the kernels know the mask."""
    if mask.dropout > 0.0:
        return True
    return plan.path == "fused" and all(w is None or w.stride(-1) == 1 for w in members.weights)


Prep = tuple[Any, int, dict[str, Any]]  # a kernel, its programs, its arguments


def launch_prep(prep: Prep, plan: Plan) -> None:
    """Launch the thin products."""
    launch(*prep, plan.prep)


def forward_arguments(x: Tensor, members: Members, us: list[Tensor], v: Tensor, plan: Plan, mask: Mask) -> Prep:
    """What `prep_forward` is launched with."""
    (M, K), config, width = x.shape, plan.prep, members.width
    factors, row_blocks = tuple(unit_rows(a) for a in members.a), cdiv(M, config.block_m)
    splits = prep_splits(row_blocks, cdiv(K, config.block_k))
    partial, arrivals = workspace(x, row_blocks * splits * config.block_m * width * len(us), row_blocks, splits)
    arguments = dict(
        x=x, factors=factors, us=tuple(us), v=v, partial=partial, counters=arrivals, M=M, K=K, sx=x.stride(0),
        sf=tuple(a.stride(0) for a in factors), sv=v.stride(0), seed=mask.seed, threshold=mask.dropout,
        DROPOUT=mask.dropout > 0.0, EVEN_K=K % config.block_k == 0, WIDE=wide(x, v, *factors), SPLITS=splits,
    )  # fmt: skip
    return prep_forward, row_blocks * splits, arguments | _prep_common(members, plan, x.dtype)


def backward_arguments(
    dys: Sequence[Tensor], members: Members, t: Tensor, w: Tensor, plan: Plan, need_dx: bool
) -> Prep:
    """What `prep_backward` is launched with."""
    M, config, width = t.shape[0], plan.prep, members.width
    factors, Ks = tuple(unit_rows(b) for b in members.b), tuple(dy.shape[1] for dy in dys)
    slots = cdiv(M, config.block_m) * len(dys)
    splits = prep_splits(slots, cdiv(max(Ks), config.block_k))
    partial, arrivals = workspace(t, slots * splits * config.block_m * width, slots, splits)
    arguments = dict(
        dys=tuple(dys), factors=factors, t=t, w=w, partial=partial, counters=arrivals, M=M, Ks=Ks,
        sdy=tuple(dy.stride(0) for dy in dys), sf=tuple(b.stride(0) for b in factors), sw=w.stride(0), NEED_DX=need_dx,
        EVEN_K=all(k % config.block_k == 0 for k in Ks), WIDE=wide(t, *dys, *factors), SPLITS=splits,
    )  # fmt: skip
    return prep_backward, slots * splits, arguments | _prep_common(members, plan, t.dtype)


def _prep_common(members: Members, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    width, config = members.width, plan.prep
    return dict(
        cores=tuple(core.contiguous() for core in members.cores), scales=tuple(members.scales),
        EVEN_R=members.r == width, PRECISION=precision(dtype), CORE_PRECISION=_core_precision(dtype), R=members.r,
        PARTS=rank_parts(members.r), RP=width, BM=config.block_m, BK=config.block_k, BJ=32 if width % 32 == 0 else 16,
    )  # fmt: skip


def _extended_forward(
    x: Tensor, members: Members, biases: Sequence[Tensor | None], v: Tensor, ys: list[Tensor], plan: Plan
) -> None:
    M, Ns = x.shape[0], tuple(y.shape[1] for y in ys)
    weights, Ks = _weights(members, x)
    even, config = _settle(plan, Ks, members.r, False)
    tiles = cdiv(M, config.block_m) * sum(cdiv(N, config.block_n) for N in Ns)
    splits = gemm_splits(tiles, _steps((*Ks, members.r), config), M)
    partial, arrivals = workspace(x, tiles * splits * config.block_m * config.block_n, tiles, splits)
    biased = any(bias is not None for bias in biases)
    filled = [x.new_zeros(N) if bias is None else bias for bias, N in zip(biases, Ns, strict=True)] if biased else ys
    arguments = dict(
        xs=(x,), weights=weights, v=v, factors=tuple(unit_rows(b) for b in members.b), biases=tuple(filled),
        ys=tuple(ys), t=v, us=(v,), dcores=(partial,), partial=partial, counters=arrivals, M=M, Ns=Ns, Ks=Ks,
        core_programs=0, seed=0, threshold=0.0, BACKWARD=False, HAS_BIAS=biased, DROPOUT=False, EVEN_K=even,
        SPLITS=splits, CHUNKS=1,
    )  # fmt: skip
    launch(extended_gemm, tiles * splits, arguments | _extended_common(arguments, members, config), config)


def extended_backward(
    dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], t: Tensor, w: Tensor, dx: Tensor | None,
    dcores: list[Tensor], plan: Plan, mask: Mask,
) -> None:  # fmt: skip
    """dx, unless another path writes it, and dR, if it is needed: its programs come first and run beside the others."""
    M, r, dropped = t.shape[0], members.r, mask.dropout > 0.0
    weights, Ks = _weights(members, *dys)
    even, config = _settle(plan, Ks, r, dropped)
    tiles = cdiv(M, config.block_m) * cdiv(dx.shape[1], config.block_n) if dx is not None else 0
    splits = 1 if dropped or not tiles else gemm_splits(tiles, _steps((*Ks, *(r for _ in Ks)), config), M)
    chunks, slots = core_chunks(M), len(dcores) * cdiv(members.width, CORE_BLOCK) ** 2
    size = slots * chunks * CORE_BLOCK**2 + (tiles * splits * config.block_m * config.block_n if splits > 1 else 0)
    partial, arrivals = workspace(t, size, slots + tiles, max(splits, chunks))
    output = dx if dx is not None else t
    arguments = dict(
        xs=tuple(dys), weights=weights, v=w, factors=tuple(unit_rows(a) for a in members.a), biases=(output,),
        ys=(output,), t=t, us=tuple(us) if dcores else (t,), dcores=tuple(dcores) or (partial,), partial=partial,
        counters=arrivals, M=M, Ns=(output.shape[1],), Ks=Ks, core_programs=slots * chunks, seed=mask.seed,
        threshold=mask.dropout, BACKWARD=True, HAS_BIAS=False, DROPOUT=dropped, EVEN_K=even, SPLITS=splits,
        CHUNKS=chunks,
    )  # fmt: skip
    grid = slots * chunks + tiles * splits
    launch(extended_gemm, grid, arguments | _extended_common(arguments, members, config), config)


def _extended_common(arguments: dict[str, Any], members: Members, config: GemmConfig) -> dict[str, Any]:
    """Strides, flags and blocks, the same in both directions."""
    xs, ys, weights, factors, v = (arguments[name] for name in ("xs", "ys", "weights", "factors", "v"))
    return dict(
        sx=tuple(x.stride(0) for x in xs), sw=tuple(w.stride(0) for w in weights), sv=v.stride(0),
        sf=tuple(f.stride(0) for f in factors), sy=tuple(y.stride(0) for y in ys), su=members.r,
        scales=tuple(members.scales), WIDE=wide(*xs, *ys, *weights, *factors, v), PRECISION=precision(v.dtype),
        R=members.r, RP=members.width, BM=config.block_m, BN=config.block_n, BK=config.block_k, GROUP=config.group,
        ROWS=CORE_CHUNK, BR=CORE_BLOCK, BKR=CORE_ROWS,
    )  # fmt: skip


def _addmm(x: Tensor, v: Tensor, weight: Tensor | None, b: Tensor, bias: Tensor | None) -> Tensor:
    """The adapter's product first; the base GEMM accumulates onto it."""
    y = v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
    return y if weight is None else y.addmm_(x, weight.t())


def _addmm_backward(dys: Sequence[Tensor], members: Members, w: Tensor, dx: Tensor) -> None:
    for i, (dy, weight, a) in enumerate(zip(dys, members.weights, members.a, strict=True)):
        part = w[:, i * members.width : i * members.width + members.r]
        dx = torch.mm(part, a, out=dx) if i == 0 else dx.addmm_(part, a)
        if weight is not None:
            dx.addmm_(dy, weight)


def _weights(members: Members, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The weights, rows in one piece, and the lengths of the base reductions: no weight is a reduction of length 0."""
    if members.weights[0] is None:
        return tuple(inputs[0] for _ in members.weights), tuple(0 for _ in inputs)
    return tuple(unit_rows(w) for w in members.weights if w is not None), tuple(x.shape[1] for x in inputs)


def _settle(plan: Plan, Ks: Sequence[int], r: int, dropped: bool) -> tuple[bool, GemmConfig]:
    """Whether every reduction is a whole number of steps, and the blocks that suit."""
    even = all(k % plan.gemm.block_k == 0 for k in (*Ks, r))
    return even, plan.gemm.fitted(even, dropped)


def _steps(lengths: Sequence[int], config: GemmConfig) -> int:
    return sum(cdiv(length, config.block_k) for length in lengths)


def unit_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def workspace(like: Tensor, size: int, slots: int, programs: int) -> tuple[Tensor, Tensor]:
    """fp32 partial sums and counters, where several programs share a result."""
    if programs == 1:
        nothing = like.new_empty(1, dtype=torch.float32)
        return nothing, nothing.view(torch.int32)
    return like.new_empty(size, dtype=torch.float32), counters(like.device, slots)


def wide(*tensors: Tensor) -> bool:
    """Whether an offset needs 64 bits."""
    return any(t.stride(0) * t.shape[0] >= INT32_LIMIT for t in tensors)


def precision(dtype: torch.dtype) -> str:
    """Of products of x's dtype; fp32 stays fp32 unless torch was told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _core_precision(dtype: torch.dtype) -> str:
    """Of the product with R: for a 16-bit x, TF32's 11 bits of R are more than the result keeps."""
    return precision(dtype) if dtype == torch.float32 else "tf32"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
