"""The eager backend: the adapted linear by a table of products, and that table in plain torch for any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..ops.adapted_linear import Member, Operands, kernels_of
from ..ops.autocast import no_autocast
from ..ops.registry import Kernel, register_backend
from . import weight_gradient
from .dequantize import dequantize
from .dropout import keep_mask, kept

Base = Tensor | tuple[list[Tensor], list[int]] | None  # of a `Member`


class Products(NamedTuple):
    """Matrix products of a backend: with these it computes the adapted linear of every kind."""

    # (rows [M, k], factor, transposed) -> rows factorᵀ, or rows factor, in rows' dtype or wider
    thin: Callable[[Tensor, Tensor, bool], Tensor]
    # (left [M, r], R [r, r], scale, transposed) -> s·left Rᵀ, or s·left R
    core: Callable[[Tensor, Tensor, float, bool], Tensor]
    # (left [M, r], stack [K, r, r], index [k], scale, transposed) -> s·left_i R_kᵀ, or s·left_i R_k
    cores: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
    # (rows [M, n], base, v [M, r], B [m, r], bias) -> x Wᵀ + v Bᵀ + bias
    extended: Callable[[Tensor, Base, Tensor, Tensor, Tensor | None], Tensor]
    # (rows [M, m], base, w [M, r], A [r, n], onto) -> dy W + w A, in place onto `onto` if given
    extended_transposed: Callable[[Tensor, Base, Tensor, Tensor, Tensor | None], Tensor]


def forward(products: Products, x: Tensor, operands: Operands) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j = x A_jᵀ [M, r]."""
    ys, us = [], []
    with no_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        for one in operands.members():
            source = rows
            if one.seed is not None:
                source = rows * keep_mask(rows.shape, operands.dropout, one.seed, x.device)
            u = products.thin(source, one.a, True)
            v = _times_core(products, u, one, operands, True)
            ys.append(shaped(products.extended(rows, one.base, v, one.b, one.bias), x))
            us.append(u if u.dtype == x.dtype else u.to(x.dtype))
    return ys + us


def backward(
    products: Products, dys: list[Tensor], us: list[Tensor], operands: Operands, need_dx: bool, need_dcores: bool
) -> list[Tensor]:
    """dx = Σ_j dy_j W_j + w_j A_j with t_j = dy_j B_j, w_j = s_j·t_j R_j, then dR_j = s_j·t_jᵀ u_j; or empty."""
    dx: Tensor | None = None  # of all members: autograd would write one for each and add them up
    dcores = []
    with no_autocast(dys[0]):
        for dy, u, one in zip(dys, us, operands.members(), strict=True):
            rows = dy.reshape(-1, dy.shape[-1])
            t = products.thin(rows, one.b, False)
            dcores.append(_core_gradient(t, u, one, operands) if need_dcores else one.core.new_empty((0,)))
            if not need_dx:
                continue
            w = _times_core(products, t, one, operands, False)
            if one.seed is None:
                dx = products.extended_transposed(rows, one.base, w, one.a, dx)
            else:
                part = _masked_dx(products, rows, w, one, operands.dropout)
                dx = part if dx is None else dx.add_(part)
        return [dys[0].new_empty((0,)) if dx is None else shaped(dx, dys[0]), *dcores]


def _scale(one: Member, operands: Operands) -> float:
    # inverted dropout: no scaling in evaluation
    return one.scaling if one.seed is None else one.scaling / kept(operands.dropout)


def _times_core(products: Products, left: Tensor, one: Member, operands: Operands, transposed: bool) -> Tensor:
    scale = _scale(one, operands)
    if operands.row_index is None:
        return products.core(left, one.core, scale, transposed)
    return products.cores(left, one.core, operands.row_index, scale, transposed)


def _masked_dx(products: Products, rows: Tensor, w: Tensor, one: Member, dropout: float) -> Tensor:
    """dy W + mask ∘ (w A): the mask applies to the adapter's part alone, so that is computed first."""
    part, seed = products.thin(w, one.a, False), cast(Tensor, one.seed)
    part = part if part.dtype == rows.dtype else part.to(rows.dtype)
    part.mul_(keep_mask(part.shape, dropout, seed, rows.device))
    weight = dense(one.base, rows.shape[1], one.a.shape[1], rows.dtype)
    return part if weight is None else part.addmm_(rows, weight)


def _core_gradient(t: Tensor, u: Tensor, one: Member, operands: Operands) -> Tensor:
    scale = _scale(one, operands)
    if operands.row_index is None:
        return core_gradient(t, u, one.core, scale)
    return core_gradients(t, u, one.core, operands.row_index, scale)


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [M, n] reshaped to the leading dimensions of `like`."""
    # It shares the memory but is no view to autograd: callers could not modify a real view of an op's result in place.
    return torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


def dense(base: Base, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """W [rows, columns], dequantized for this call if it is quantized; None for an adapter alone."""
    return dequantize(*base, rows, columns, dtype) if isinstance(base, tuple) else base


def thin(rows: Tensor, factor: Tensor, transposed: bool) -> Tensor:
    return rows @ (factor.t() if transposed else factor)


def times_core(left: Tensor, core: Tensor, scale: float, transposed: bool) -> Tensor:
    """s·left Rᵀ, or s·left R, in left's dtype."""
    # the scaled R is rounded first, as the GEMM takes one dtype
    chosen = (core if scale == 1.0 else core * scale).to(left.dtype)
    return left @ (chosen.t() if transposed else chosen)


def times_cores(left: Tensor, cores: Tensor, index: Tensor, scale: float, transposed: bool) -> Tensor:
    """s·left_i R_kᵀ of every row, or s·left_i R_k, each R gathered; zero where k = -1."""
    check_index(index, len(cores))
    if len(index) == 0 or len(left) == 0 or len(cores) == 0:
        return torch.zeros_like(left)
    chosen = cores.index_select(0, index.clamp(min=0).to(cores.device))
    chosen = (chosen if scale == 1.0 else chosen * scale).to(left.dtype)
    product = torch.bmm(left.view(len(index), -1, left.shape[1]), chosen.mT if transposed else chosen)
    if bool((index < 0).any()):
        product[(index < 0).to(left.device)] = 0.0
    return product.view_as(left)


def check_index(index: Tensor, count: int) -> None:
    """Raise an IndexError for an index [k] outside of [-1, count)."""
    if index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < -1 or high >= count:
        raise IndexError(
            f"expected index in [-1, {count}), one of {count} adapters or -1 for none, got {low if low < -1 else high}"
        )


def extended(rows: Tensor, base: Base, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + v Bᵀ + bias."""
    weight = dense(base, b.shape[0], rows.shape[1], rows.dtype)
    if weight is None:
        return v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
    y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return y.addmm_(v, b.t())


def extended_transposed(rows: Tensor, base: Base, w: Tensor, a: Tensor, onto: Tensor | None) -> Tensor:
    """dy W + w A, in place onto `onto` if given."""
    weight = dense(base, rows.shape[1], a.shape[1], rows.dtype)
    if weight is None:
        return w @ a if onto is None else onto.addmm_(w, a)
    return (rows @ weight if onto is None else onto.addmm_(rows, weight)).addmm_(w, a)


def core_gradient(t: Tensor, u: Tensor, core: Tensor, scale: float) -> Tensor:
    """dR = s·tᵀ u [r, r] in R's dtype, or of several R's at once, t and u [K, M, r]."""
    # In bf16 the GEMM sums in fp32 and rounds once, as autograd would. In fp16 the sum over all tokens could overflow.
    in_bf16 = t.dtype == torch.bfloat16
    dcore = (t.mT @ u).to(core.dtype) if in_bf16 else t.to(core.dtype).mT @ u.to(core.dtype)
    return dcore if scale == 1.0 else dcore.mul_(scale)


def core_gradients(t: Tensor, u: Tensor, cores: Tensor, index: Tensor, scale: float) -> Tensor:
    """dR_k = s·t_kᵀ u_k [K, r, r] in R's dtype, over the rows of k in their order, as if k were the only one."""
    gradients = torch.zeros_like(cores)
    order = index.argsort(stable=True)[int((index < 0).sum()) :]  # rows by adapter, those of none left out
    if len(order) == 0:
        return gradients
    present, counts = index[order].unique_consecutive(return_counts=True)
    rows = order.to(t.device)
    t_rows, u_rows = (one.view(len(index), -1, one.shape[1]).index_select(0, rows) for one in (t, u))
    if bool((counts == counts[0]).all()):  # one batched product, where each adapter has as many rows
        t_rows, u_rows = (one.reshape(len(present), -1, one.shape[2]) for one in (t_rows, u_rows))
        gradients[present.to(t.device)] = core_gradient(t_rows, u_rows, cores, scale)
        return gradients
    for k, t_k, u_k in zip(present.tolist(), t_rows.split(counts.tolist()), u_rows.split(counts.tolist()), strict=True):
        gradients[k] = core_gradient(t_k.flatten(0, 1), u_k.flatten(0, 1), cores, scale)
    return gradients


EAGER = Products(thin, times_core, times_cores, extended, extended_transposed)
eager_forward, eager_backward = partial(forward, EAGER), partial(backward, EAGER)
KERNELS = kernels_of(eager_forward, eager_backward) | {
    "dequantize": Kernel(dequantize),
    "gradient_add": Kernel(weight_gradient.gradient_add),
    "gradient_signs": Kernel(weight_gradient.gradient_signs),
}


def register() -> None:
    """Register for every device; CompositeExplicitAutograd leaves autograd to the op's own formula."""
    register_backend("eager", KERNELS, ("CompositeExplicitAutograd",))
