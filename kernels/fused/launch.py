"""From tensors to launches: grids, workspaces, strides and flags. Two launches forward and two backward, group or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .configs import (
    CORE_BLOCK,
    CORE_CHUNK,
    CORE_ROWS,
    GemmConfig,
    PrepConfig,
    cdiv,
    core_chunks,
    gemm_splits,
    prep_members,
    prep_splits,
    rank_parts,
)
from .gemm import extended_gemm
from .plan import Plan
from .prep import prep_backward, prep_forward
from .workspace import counters

INT32_LIMIT = 2**31
_observers: list[Callable[[Launch], None]] = []
_dry = 0


@dataclass(frozen=True)
class Launch:
    """What was launched: a kernel, its grid, its arguments by name and the compiler's options."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Members:
    """Layers that read the same x [M, n]: weights W_i [m_i, n], A_i [r, n], R_i [r, r], B_i [m_i, r], scales s_i."""

    weights: Sequence[Tensor | None]
    a: Sequence[Tensor]
    cores: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]

    @property
    def r(self) -> int:
        return self.a[0].shape[0]

    def of(self, part: slice) -> Members:
        """Some of the members."""
        return Members(*(field[part] for field in (self.weights, self.a, self.cores, self.b, self.scales)))


@contextmanager
def observed(dry: bool = False) -> Iterator[list[Launch]]:
    """The list of launches that the block makes; `dry` makes none, so that tensors may lie on `meta`."""
    global _dry
    launches: list[Launch] = []
    _observers.append(launches.append)
    _dry += dry
    try:
        yield launches
    finally:
        _dry -= dry
        _observers.remove(launches.append)


def forward(
    x: Tensor, members: Members, biases: Sequence[Tensor | None], plan: Plan, dropout: float = 0.0, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """y_i = x W_iᵀ + s_i·x A_iᵀ R_iᵀ B_iᵀ + bias_i [M, m_i] and u_i = x A_iᵀ [M, r], for x [M, n] with rows in one piece."""
    M, r = x.shape[0], members.r
    width = sum(rank_parts(r))
    us = [x.new_empty((M, r)) for _ in members.a]
    v = x.new_empty((M, width * len(us)))
    if M == 0:
        return [x.new_empty((0, b.shape[0])) for b in members.b], us
    with _on(x):
        together = prep_members(r, len(us))
        for i in range(0, len(us), together):
            part = slice(i, i + together)
            _prep_forward(x, members.of(part), us[part], v[:, i * width :], plan, dropout, seed)
        if not _fused(plan, members, dropout):
            vs = [v[:, i * width : i * width + r] for i in range(len(us))]
            return [_addmm(x, *parts) for parts in zip(vs, members.weights, members.b, biases, strict=True)], us
        ys = [x.new_empty((M, b.shape[0])) for b in members.b]
        _extended_forward(x, members, biases, v, ys, plan)
    return ys, us


def backward(
    dys: Sequence[Tensor],
    members: Members,
    us: Sequence[Tensor],
    plan: Plan,
    need_dx: bool,
    need_dcore: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """dx = Σ_i dy_i W_i + s_i·dy_i B_i R_i A_i [M, n] and dR_i = s_i·(dy_i B_i)ᵀ u_i [r, r], for dy_i [M, m_i]."""
    M, n = dys[0].shape[0], members.a[0].shape[1]
    dx = dys[0].new_empty((M, n)) if need_dx else None
    dcores = [torch.empty_like(core, memory_format=torch.contiguous_format) for core in members.cores]
    if M == 0:
        return dx, [dcore.zero_() for dcore in dcores] if need_dcore else None
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
    width = sum(rank_parts(members.r))
    t = dys[0].new_empty((M, width * len(dys)))
    w = torch.empty_like(t) if need_dx else t
    with _on(t):
        _prep_backward(dys, members, t, w, plan, need_dx)
        fused = need_dx and _fused(plan, members, dropout)
        if fused or need_dcore:
            target = dx if fused else None
            _extended_backward(dys, members, us, t, w, target, dcores if need_dcore else [], plan, dropout, seed)
        if dx is not None and not fused:
            _addmm_backward(dys, members, w, dx)
    return dx, dcores if need_dcore else None


def _fused(plan: Plan, members: Members, dropout: float) -> bool:
    """Whether the extended GEMM runs; with dropout always, as only the kernels know the mask."""
    if dropout > 0.0:
        return True
    return plan.path == "fused" and all(w is None or w.stride(-1) == 1 for w in members.weights)


def _prep_forward(
    x: Tensor, members: Members, us: list[Tensor], v: Tensor, plan: Plan, dropout: float, seed: int
) -> None:
    (M, K), r, parts, config = x.shape, members.r, rank_parts(members.r), plan.prep
    factors = tuple(_rows(a) for a in members.a)
    row_blocks, width = cdiv(M, config.block_m), sum(parts)
    splits = prep_splits(row_blocks, cdiv(K, config.block_k))
    partial, arrivals = _workspace(x, row_blocks * splits * config.block_m * width * len(us), row_blocks, splits)
    precision = _precision(x.dtype)
    _launch(
        prep_forward,
        row_blocks * splits,
        dict(
            x=x, factors=factors, cores=tuple(c.contiguous() for c in members.cores), us=tuple(us), v=v,
            partial=partial, counters=arrivals, M=M, K=K, sx=x.stride(0), sf=tuple(a.stride(0) for a in factors),
            sv=v.stride(0), scales=tuple(members.scales), seed=seed, threshold=dropout, DROPOUT=dropout > 0.0,
            EVEN_R=r == width, EVEN_K=K % config.block_k == 0, WIDE=_wide(x, v, *factors),
            PRECISION=precision, CORE_PRECISION=_core_precision(x.dtype), R=r, PARTS=parts,
            RP=width, BM=config.block_m, BK=config.block_k, BJ=_core_columns(width), SPLITS=splits,
        ),
        config,
    )  # fmt: skip


def _prep_backward(dys: Sequence[Tensor], members: Members, t: Tensor, w: Tensor, plan: Plan, need_dx: bool) -> None:
    M, r, parts, config = t.shape[0], members.r, rank_parts(members.r), plan.prep
    factors, Ks = tuple(_rows(b) for b in members.b), tuple(dy.shape[1] for dy in dys)
    row_blocks, width = cdiv(M, config.block_m), sum(parts)
    slots = row_blocks * len(dys)
    splits = prep_splits(slots, cdiv(max(Ks), config.block_k))
    partial, arrivals = _workspace(t, slots * splits * config.block_m * width, slots, splits)
    _launch(
        prep_backward,
        slots * splits,
        dict(
            dys=tuple(dys), factors=factors, cores=tuple(c.contiguous() for c in members.cores), t=t, w=w,
            partial=partial, counters=arrivals, M=M, Ks=Ks, sdy=tuple(dy.stride(0) for dy in dys),
            sf=tuple(b.stride(0) for b in factors), sw=w.stride(0), scales=tuple(members.scales), NEED_DX=need_dx,
            EVEN_R=r == width, EVEN_K=all(k % config.block_k == 0 for k in Ks), WIDE=_wide(t, *dys, *factors),
            PRECISION=_precision(t.dtype), CORE_PRECISION=_core_precision(t.dtype), R=r, PARTS=parts, RP=width,
            BM=config.block_m, BK=config.block_k, BJ=_core_columns(width), SPLITS=splits,
        ),
        config,
    )  # fmt: skip


def _extended_forward(
    x: Tensor, members: Members, biases: Sequence[Tensor | None], v: Tensor, ys: list[Tensor], plan: Plan
) -> None:
    M, config = x.shape[0], plan.gemm
    Ns = tuple(y.shape[1] for y in ys)
    weights, Ks = _weights(members, x)
    tiles = cdiv(M, config.block_m) * sum(cdiv(N, config.block_n) for N in Ns)
    splits = _splits(tiles, (*Ks, members.r), M, config.block_k)
    partial, arrivals = _workspace(x, tiles * splits * config.block_m * config.block_n, tiles, splits)
    bias = any(bias is not None for bias in biases)
    filled = tuple(x.new_zeros(N) if bias and b is None else b for b, N in zip(biases, Ns, strict=True)) if bias else ys
    factors = tuple(_rows(b) for b in members.b)
    _launch_extended(
        dict(
            xs=(x,), weights=weights, v=v, factors=factors, biases=tuple(filled), ys=tuple(ys), t=v, us=(v,),
            dcores=(partial,), partial=partial, counters=arrivals, M=M, Ns=Ns, Ks=Ks, core_programs=0, sx=(x.stride(0),),
            seed=0, threshold=0.0, BACKWARD=False, HAS_BIAS=bias, DROPOUT=False, SPLITS=splits, CHUNKS=1,
        ),
        members, tiles * splits, plan,
    )  # fmt: skip


def _extended_backward(
    dys: Sequence[Tensor], members: Members, us: Sequence[Tensor], t: Tensor, w: Tensor, dx: Tensor | None,
    dcores: list[Tensor], plan: Plan, dropout: float, seed: int,
) -> None:  # fmt: skip
    """dx, where it is to be written here, and dR: the programs of dR come first and run beside the others."""
    if dropout > 0.0:  # two sums side by side in registers
        plan = replace(plan, gemm=replace(plan.gemm, block_m=min(64, plan.gemm.block_m), block_n=64, registers=None))
    M, r, config = t.shape[0], members.r, plan.gemm
    weights, Ks = _weights(members, *dys)
    tiles = cdiv(M, config.block_m) * cdiv(dx.shape[1], config.block_n) if dx is not None else 0
    splits = 1 if dropout else _splits(tiles, (*Ks, *(r for _ in Ks)), M, config.block_k) if tiles else 1
    chunks = core_chunks(M)
    slots = len(dcores) * cdiv(sum(rank_parts(r)), CORE_BLOCK) ** 2
    core_size = slots * chunks * CORE_BLOCK**2
    size = (tiles * splits * config.block_m * config.block_n if splits > 1 else 0) + core_size
    partial, arrivals = _workspace(t, size, slots + tiles, max(splits, chunks))
    output = dx if dx is not None else t
    _launch_extended(
        dict(
            xs=tuple(dys), weights=weights, v=w, factors=tuple(_rows(a) for a in members.a), biases=(output,),
            ys=(output,), t=t, us=tuple(us) if dcores else (t,), dcores=tuple(dcores) or (partial,), partial=partial,
            counters=arrivals, M=M, Ns=(output.shape[1],), Ks=Ks, core_programs=slots * chunks,
            sx=tuple(dy.stride(0) for dy in dys), seed=seed, threshold=dropout, BACKWARD=True, HAS_BIAS=False,
            DROPOUT=dropout > 0.0, SPLITS=splits, CHUNKS=chunks,
        ),
        members, slots * chunks + tiles * splits, plan,
    )  # fmt: skip


def _launch_extended(arguments: dict[str, Any], members: Members, grid: int, plan: Plan) -> None:
    """Add what both directions share, and launch."""
    config, r = plan.gemm, members.r
    xs, ys, weights, factors, v = (arguments[name] for name in ("xs", "ys", "weights", "factors", "v"))
    arguments |= dict(
        sw=tuple(w.stride(0) for w in weights), sv=v.stride(0), sf=tuple(f.stride(0) for f in factors),
        sy=tuple(y.stride(0) for y in ys), su=r, scales=tuple(members.scales),
        EVEN_K=all(k % config.block_k == 0 for k in (*arguments["Ks"], r)), WIDE=_wide(*xs, *ys, *weights, *factors, v),
        PRECISION=_precision(v.dtype), R=r, RP=sum(rank_parts(r)), BM=config.block_m, BN=config.block_n,
        BK=config.block_k, GROUP=config.group, ROWS=CORE_CHUNK, BR=CORE_BLOCK, BKR=CORE_ROWS,
    )  # fmt: skip
    _launch(extended_gemm, grid, arguments, config)


def _launch(kernel: Any, grid: int, arguments: dict[str, Any], config: PrepConfig | GemmConfig) -> None:
    options = {"num_warps": config.warps, "num_stages": config.stages}
    capped = isinstance(config, GemmConfig) and config.registers and arguments["EVEN_K"] and not arguments["DROPOUT"]
    if capped and not _interpreted(kernel):
        options["maxnreg"] = config.registers
    for observer in _observers:
        observer(Launch(kernel, grid, arguments, options))
    if not _dry:
        kernel[(grid,)](**arguments, **options)


def _interpreted(kernel: Any) -> bool:
    return not hasattr(kernel, "device_caches")


def _addmm(x: Tensor, v: Tensor, weight: Tensor | None, b: Tensor, bias: Tensor | None) -> Tensor:
    """The adapter's product first; the base GEMM accumulates onto it."""
    y = v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
    return y if weight is None else y.addmm_(x, weight.t())


def _addmm_backward(dys: Sequence[Tensor], members: Members, w: Tensor, dx: Tensor) -> None:
    width, r = sum(rank_parts(members.r)), members.r
    for i, (dy, weight, a) in enumerate(zip(dys, members.weights, members.a, strict=True)):
        part = w[:, i * width : i * width + r]
        torch.mm(part, a, out=dx) if i == 0 else dx.addmm_(part, a)
        if weight is not None:
            dx.addmm_(dy, weight)


def _weights(members: Members, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The weights with rows in one piece and the lengths of the base reductions; no weight is a reduction of length 0."""
    if members.weights[0] is None:
        return tuple(inputs[0] for _ in members.weights), tuple(0 for _ in inputs)
    return tuple(_rows(w) for w in members.weights if w is not None), tuple(x.shape[1] for x in inputs)


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _splits(tiles: int, lengths: Sequence[int], rows: int, block_k: int) -> int:
    return gemm_splits(tiles, sum(cdiv(k, block_k) for k in lengths), rows)


def _workspace(like: Tensor, size: int, slots: int, programs: int) -> tuple[Tensor, Tensor]:
    """fp32 partial sums and counters, where several programs share a result."""
    if programs == 1:
        nothing = like.new_empty(1, dtype=torch.float32)
        return nothing, nothing.view(torch.int32)
    return like.new_empty(size, dtype=torch.float32), counters(like.device, slots)


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset needs 64 bits."""
    return any(t.dim() == 2 and t.stride(0) * t.shape[0] >= INT32_LIMIT for t in tensors)


def _precision(dtype: torch.dtype) -> str:
    """Of products of x's dtype; fp32 stays fp32 unless torch was told that TF32 will do."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _core_precision(dtype: torch.dtype) -> str:
    """Of the product with R: for a 16-bit x, TF32's 11 bits of R are more than the result keeps."""
    return _precision(dtype) if dtype == torch.float32 else "tf32"


def _core_columns(width: int) -> int:
    return 32 if width % 32 == 0 else 16


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
