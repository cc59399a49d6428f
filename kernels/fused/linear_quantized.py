"""From a quantized weight's tensors to launches: dequantized beside the thin products, or inside a GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import linear as dense
from .block_sizes import DEQUANTIZE_BYTES, cdiv, dequantize_config, gemm_splits, quantized_config
from .gemm_4bit import dequantize, prep_backward_quantized, prep_forward_quantized, quantized_gemm
from .launcher import launch
from .linear import Mask, Members, on_device, precision, unit_rows, wide
from .plan import Plan

INLINE = "inline"


@dataclass(frozen=True)
class Quantized:
    """W [m, n] in 4 bits: [bytes, absmax, table], or nested [bytes, absmax8, table, absmax2, table2, offset]."""

    tensors: Sequence[Tensor]
    block: int
    block2: int
    rounding: int
    m: int
    n: int

    def arguments(self) -> dict[str, Any]:
        """What every kernel is given of it."""
        octets, absmax, table, *nested = self.tensors
        absmax2, table2, offset = nested or (None, None, None)
        return dict(
            octets=octets, absmax=absmax, table=table, absmax2=absmax2, table2=table2, offset=offset,
            BLOCK=self.block, BLOCK2=self.block2, ROUNDING=self.rounding,
        )  # fmt: skip

    def inline(self, plan: Plan, mask: Mask) -> bool:
        """Whether the GEMM dequantizes as it goes."""
        return plan.weights == INLINE and self.n % 2 == 0 and mask.dropout == 0.0


def dequantized(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """W [m, n]."""
    out = torch.empty((weight.m, weight.n), dtype=dtype, device=weight.tensors[0].device)
    if out.numel():
        arguments = weight.arguments() | dict(out=out, ELEMENTS=out.numel(), BYTES=DEQUANTIZE_BYTES)
        with on_device(out):
            launch(dequantize, cdiv(out.numel(), 2 * DEQUANTIZE_BYTES), arguments, dequantize_config(), exact=True)
    return out


def forward(
    x: Tensor, weight: Quantized, members: Members, bias: Tensor | None, plan: Plan, mask: Mask
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + s·u Rᵀ Bᵀ + bias [M, m] and u = x Aᵀ [M, r]; `members` has the one layer's factors and no weight."""
    M, u = x.shape[0], x.new_empty((x.shape[0], members.r))
    if M == 0 or weight.n == 0:
        y = x.new_zeros((M, weight.m))
        return (y if bias is None else y + bias), u.zero_()
    v = x.new_empty((M, members.width))
    with on_device(x):
        if weight.inline(plan, mask):
            dense.launch_prep(dense.forward_arguments(x, members, [u], v, plan, mask), plan)
            return _gemm(x, weight, v, members, bias, x.new_empty((M, weight.m)), False), u
        scratch = x.new_empty((weight.m, weight.n))
        prep = dense.forward_arguments(x, members, [u], v, plan, mask)
        _prep_beside(prep, weight, scratch, plan)
        whole = Members([scratch], members.a, members.cores, members.b, members.scales)
        (y,) = dense.after_prep(x, whole, [bias], v, plan, mask)
    return y, u


def backward(
    dy: Tensor,
    weight: Quantized,
    members: Members,
    u: Tensor,
    plan: Plan,
    need_dx: bool,
    need_dcore: bool,
    mask: Mask,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy W + (s·t R) A [M, n] and dR = s·tᵀ u [r, r], for dy [M, m]."""
    M, dy = dy.shape[0], unit_rows(dy)
    if M == 0 or weight.m == 0 or not need_dx:
        bare = Members([None], members.a, members.cores, members.b, members.scales)
        dx, dcores = dense.backward([dy], bare, [u], plan, False, need_dcore, mask)
        return (dy.new_zeros((M, weight.n)) if need_dx else None), (dcores[0] if dcores else None)
    t = dy.new_empty((M, members.width))
    w, dcores = torch.empty_like(t), [core.new_empty(core.shape) for core in members.cores] if need_dcore else []
    with on_device(dy):
        prep = dense.backward_arguments([dy], members, t, w, plan, True)
        if weight.inline(plan, mask):
            dense.launch_prep(prep, plan)
            if dcores:
                dense.extended_backward([dy], members, [u], t, w, None, dcores, plan, mask)
            dx = _gemm(dy, weight, w, members, None, dy.new_empty((M, weight.n)), True)
        else:
            scratch = dy.new_empty((weight.m, weight.n))
            _prep_beside(prep, weight, scratch, plan)
            whole = Members([scratch], members.a, members.cores, members.b, members.scales)
            dx = dense.after_prep_backward([dy], whole, [u], t, w, dcores, plan, mask)
    return dx, dcores[0] if dcores else None


def _prep_beside(prep: tuple[Any, int, dict[str, Any]], weight: Quantized, scratch: Tensor, plan: Plan) -> None:
    """The thin products of a call, and W into the scratch, in one launch."""
    kernel, programs, arguments = prep
    beside = prep_forward_quantized if kernel is dense.prep_forward else prep_backward_quantized
    arguments = arguments | weight.arguments() | dict(
        scratch=scratch, ELEMENTS=scratch.numel(), prep_programs=programs, BYTES=DEQUANTIZE_BYTES
    )  # fmt: skip
    grid = programs + cdiv(scratch.numel(), 2 * DEQUANTIZE_BYTES)
    launch(beside, grid, arguments, plan.prep, exact=True)


def _gemm(
    x: Tensor, weight: Quantized, v: Tensor, members: Members, bias: Tensor | None, y: Tensor, is_backward: bool
) -> Tensor:
    M, columns = y.shape
    length, config = x.shape[1], quantized_config(M, x.element_size())
    factor = unit_rows(members.a[0] if is_backward else members.b[0])
    tiles, steps = cdiv(M, config.block_m) * cdiv(columns, config.block_n), cdiv(length, config.block_k)
    splits = gemm_splits(tiles, steps, M)
    partial, arrivals = dense.workspace(x, tiles * splits * config.block_m * config.block_n, tiles, splits)
    arguments = weight.arguments() | dict(
        x=x, v=v, factor=factor, bias=bias, y=y, partial=partial, counters=arrivals, M=M, N=weight.m, K=weight.n,
        sx=x.stride(0), sv=v.stride(0), sf=factor.stride(0), sy=y.stride(0), BACKWARD=is_backward,
        WIDE=wide(x, y, factor, v) or weight.m * weight.n >= dense.INT32_LIMIT, PRECISION=precision(x.dtype),
        R=members.r, BM=config.block_m, BN=config.block_n, BK=config.block_k, SPLITS=splits,
    )  # fmt: skip
    launch(quantized_gemm, tiles * splits, arguments, config, exact=True)
    return y
