"""The adapted linear over a 4-bit weight, forward and backward.

`inline`: the thin products, then a GEMM that dequantizes as it goes, which reads the packed weight once for each block
of rows. `scratch`: W is dequantized in the launch of the thin products, then the dense paths use it. These launches are
`exact`: dequantization agrees with bitsandbytes to the bit only without contraction to FMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..compat.triton import may_overlap
from . import extended_gemm, low_rank
from . import linear as dense
from .block_sizes import DEQUANTIZE, DEQUANTIZE_BYTES, cdiv, gemm_splits, quantized_config
from .dequantize_4bit import dequantize
from .gemm_4bit import quantized_gemm
from .launcher import Launch, launch
from .operands import Arguments, Mask, Members, allocate_workspace, needs_int64, on_device, precision, unit_rows
from .plan import LaunchPlan


class Quantized(NamedTuple):
    """W [m, n] in 4 bits: its three tensors, or six with nested statistics, and [block, block2, rounding]."""

    tensors: Sequence[Tensor]
    storage: tuple[int, ...]
    m: int
    n: int

    def arguments(self) -> Arguments:
        """Return the arguments by which every kernel takes this weight."""
        return dict(weight=(*self.tensors, None, None, None)[:6], STORAGE=self.storage)

    def is_inline(self, plan: LaunchPlan, mask: Mask) -> bool:
        """True if the GEMM dequantizes as it goes: no byte may straddle two rows, and it has no dropout."""
        return plan.weights == "inline" and self.n % 2 == 0 and mask.dropout == 0.0


def dequantized(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """W [m, n]."""
    out = torch.empty((weight.m, weight.n), dtype=dtype, device=weight.tensors[0].device)
    if out.numel():
        grid = cdiv(out.numel(), 2 * DEQUANTIZE_BYTES)
        arguments = weight.arguments() | dict(out=out, ELEMENTS=out.numel(), BLOCK_BYTES=DEQUANTIZE_BYTES)
        with on_device(out):
            launch(Launch(dequantize, grid, arguments, DEQUANTIZE, exact=True))
    return out


def forward(x: Tensor, weight: Quantized, members: Members, plan: LaunchPlan, mask: Mask) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + s·u Rᵀ Bᵀ + bias [M, m] and u = x Aᵀ [M, r]; `members` has the one layer's factors and no weight."""
    M, u, (bias,) = x.shape[0], x.new_empty((x.shape[0], members.r)), members.biases
    inline = weight.is_inline(plan, mask)
    plan = plan if inline else replace(plan, overlaps=False)  # W is written together with v
    if M == 0 or weight.n == 0:
        y = x.new_zeros((M, weight.m))
        return (y if bias is None else y + bias), u.zero_()
    v = x.new_empty((M, members.width))
    with on_device(x):
        if inline:
            launch(low_rank.forward_call(x, members, [u], v, plan, mask))
            return _gemm(x, weight, v, members, x.new_empty((M, weight.m)), plan, False), u
        scratch = x.new_empty((weight.m, weight.n))  # W for the length of this call; backward dequantizes again
        prep = low_rank.forward_call(x, members, [u], v, plan, mask)
        _launch_prep_and_dequantize(prep, weight, scratch)
        (y,) = dense.after_prep(x, members._replace(weights=[scratch]), v, plan)
    return y, u


def backward(
    dy: Tensor, weight: Quantized, members: Members, u: Tensor, plan: LaunchPlan, need: tuple[bool, bool], mask: Mask
) -> tuple[Tensor | None, list[Tensor]]:
    """dx = dy W + (s·t R) A [M, n] and [dR = s·tᵀ u [r, r]], whichever of the two is needed, for dy [M, m]."""
    need_dx, need_dcore = need
    M, dy = dy.shape[0], unit_rows(dy)
    if M == 0 or weight.m == 0 or not need_dx:  # dR needs no weight
        _, dcores = dense.backward([dy], members._replace(weights=[None]), [u], plan, False, need_dcore, mask)
        return dy.new_zeros((M, weight.n)) if need_dx else None, dcores
    t = dy.new_empty((M, members.width))
    inline = weight.is_inline(plan, mask)
    plan = plan if inline else replace(plan, overlaps=False)
    w, dcores = torch.empty_like(t), [core.new_empty(core.shape) for core in members.cores] if need_dcore else []
    with on_device(dy):
        prep = low_rank.backward_call([dy], members, t, w, plan, True)
        if inline:
            launch(prep)
            dx = _gemm(dy, weight, w, members, dy.new_empty((M, weight.n)), plan, True)
            if dcores:
                launch(extended_gemm.backward_call([dy], members, [u], t, w, None, dcores, plan, mask))
        else:
            scratch = dy.new_empty((weight.m, weight.n))
            _launch_prep_and_dequantize(prep, weight, scratch)
            dx = dense.after_prep_backward([dy], members._replace(weights=[scratch]), [u], (t, w), dcores, plan, mask)
    return dx, dcores


def _launch_prep_and_dequantize(prep: Launch, weight: Quantized, scratch: Tensor) -> None:
    """Compute the thin products of a call, and dequantize W into the scratch, in one launch."""
    storage = dict(out=scratch, ELEMENTS=scratch.numel(), prep_programs=prep.grid, BLOCK_BYTES=DEQUANTIZE_BYTES)
    grid = prep.grid + cdiv(scratch.numel(), 2 * DEQUANTIZE_BYTES)
    launch(Launch(prep.kernel, grid, prep.arguments | weight.arguments() | storage, prep.config, exact=True))


def _gemm(
    x: Tensor, weight: Quantized, v: Tensor, members: Members, y: Tensor, plan: LaunchPlan, is_backward: bool
) -> Tensor:
    (M, columns), overlaps = y.shape, plan.overlaps and may_overlap(quantized_gemm)
    bias = None if is_backward else members.biases[0]
    length, config = x.shape[1], quantized_config(M, x.element_size())
    factor = unit_rows(members.a[0] if is_backward else members.b[0])
    tiles, steps = cdiv(M, config.block_m) * cdiv(columns, config.block_n), cdiv(length, config.block_k)
    splits = gemm_splits(tiles, steps, M)
    partial, counters = allocate_workspace(x, tiles * splits * config.block_m * config.block_n, tiles, splits)
    arguments = weight.arguments() | dict(
        x=x,
        v=v,
        factor=factor,
        bias=None if bias is None else bias.contiguous(),
        y=y,
        partial=partial,
        counters=counters,
        M=M,
        N=weight.m,
        K=weight.n,
        stride_x=x.stride(0),
        stride_v=v.stride(0),
        stride_factor=factor.stride(0),
        stride_y=y.stride(0),
        BACKWARD=is_backward,
        WIDE=needs_int64(x, y, factor, v, elements=weight.m * weight.n),
        OVERLAPS=overlaps,
        ONE_SCALE=_has_one_scale(weight, config.block_n if is_backward else config.block_k),
        PRECISION=precision(x.dtype),
        R=members.r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        splits=splits,
        SPLIT=splits > 1,
    )
    launch(Launch(quantized_gemm, tiles * splits, arguments, config, exact=True, overlaps=overlaps))
    return y


def _has_one_scale(weight: Quantized, columns: int) -> bool:
    """Return True if `columns` of a row share a scale and can be read in words of four bytes."""
    block = weight.storage[0]
    return weight.n % block == 0 and block % columns == 0 and weight.tensors[0].data_ptr() % 4 == 0
