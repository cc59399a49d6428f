"""The adapted linear with an R for each row, in plain torch; other backends give products of their own.

R of each row is gathered, [n, r, r], and multiplied in one batched product. The base's product and the thin ones are
those of a single adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...ops.linear_rows import NO_QUANT, check_index
from ...ops.registry import register_backend
from .linear import core_gradient, no_autocast, shaped
from .linear_quantized import dequantize

Quant = tuple[list[Tensor], list[int]]


class Products(NamedTuple):
    """Matrix products of a backend.

    Attributes:
        thin: (rows [M, k], factor [m, k]) -> their product [M, m], in rows' dtype or wider.
        cores: (left [M, r], cores [K, r, r], index [n], scale, transposed) -> s·left_i R_kᵀ, or s·left_i R_k.
        extended: (rows [M, in], W or None, quant, v [M, r], B [out, r], bias) -> x Wᵀ + v Bᵀ + bias.
        extended_transposed: (rows [M, out], W or None, quant, w [M, r], A [r, in], onto) -> dy W + w A, added in place
            to `onto` where that is not None.
    """

    thin: Callable[[Tensor, Tensor], Tensor]
    cores: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
    extended: Callable[..., Tensor]
    extended_transposed: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, Tensor]] | None = None


def thin(rows: Tensor, factor: Tensor) -> Tensor:
    """The product with the rows of a factor."""
    return rows @ factor.t()


def extended(rows: Tensor, weight: Tensor | None, quant: Quant, v: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + v Bᵀ + bias, W dense or dequantized for this call; the adapter's part accumulates onto the base's."""
    dense = weight if weight is not None else dequantize(*quant, b.shape[0], rows.shape[1], rows.dtype)
    y = rows @ dense.t() if bias is None else torch.addmm(bias, rows, dense.t())
    return y.addmm_(v, b.t())


def extended_transposed(
    rows: Tensor, weight: Tensor | None, quant: Quant, w: Tensor, a: Tensor, onto: Tensor | None = None
) -> Tensor:
    """dy W + w A, or in place `onto` plus that."""
    dense = weight if weight is not None else dequantize(*quant, rows.shape[1], a.shape[1], rows.dtype)
    return (rows @ dense if onto is None else onto.addmm_(rows, dense)).addmm_(w, a)


def times_cores(left: Tensor, cores: Tensor, index: Tensor, scale: float, transposed: bool) -> Tensor:
    """s·left_i R_kᵀ of every row, or s·left_i R_k; zero where k = -1. The scaled R is rounded to left's dtype first."""
    check_index(index, len(cores))
    if len(index) == 0 or len(left) == 0 or len(cores) == 0:
        return torch.zeros_like(left)
    chosen = cores.index_select(0, index.clamp(min=0).to(cores.device))
    chosen = (chosen if scale == 1.0 else chosen * scale).to(left.dtype)
    product = torch.bmm(left.view(len(index), -1, left.shape[1]), chosen.mT if transposed else chosen)
    if bool((index < 0).any()):
        product[(index < 0).to(left.device)] = 0.0
    return product.view_as(left)


def core_gradients(t: Tensor, u: Tensor, cores: Tensor, index: Tensor, scale: float) -> Tensor:
    """dR_k = s·t_kᵀ u_k [K, r, r] in R's dtype, over the rows of k in their order, as if k had been the only one."""
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


OPS = ("linear_rows", "linear_rows_backward", "linear_rows_group", "linear_rows_group_backward")
EAGER = Products(thin, times_cores, extended, extended_transposed)


def compute(
    products: Products,
    x: Tensor,
    weight: Tensor | None,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    cores: Tensor,
    b: Tensor,
    bias: Tensor | None,
    index: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and u = x Aᵀ [M, r].

    Raises:
        IndexError: an entry of the index is no adapter.
    """
    if products.forward is not None:
        return products.forward(x, weight, quant, layout, a, cores, b, bias, index, scaling)
    with no_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        u = products.thin(rows, a)
        v = products.cores(u, cores, index, scaling, True)
        if weight is None and not quant:
            y = products.thin(v, b).to(x.dtype)
            y = y if bias is None else y.add_(bias)
        else:
            y = products.extended(rows, weight, (quant, layout), v, b, bias)
    return shaped(y, x), u.to(x.dtype)


def differentiate(
    products: Products,
    dy: Tensor,
    weight: Tensor | None,
    quant: list[Tensor],
    layout: list[int],
    a: Tensor,
    cores: Tensor,
    b: Tensor,
    u: Tensor,
    index: Tensor,
    scaling: float,
    need_dx: bool,
    need_dcores: bool,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = dy W + (s·t_i R_k) A with t = dy B, and dR_k; a gradient that is not needed is an empty tensor.

    Over a dense weight dx is added in place to `onto` [..., in], if that is given.
    """
    dx, dcores = dy.new_empty((0,)), cores.new_empty((0,))
    with no_autocast(dy):
        rows = dy.reshape(-1, dy.shape[-1])
        t = products.thin(rows, b.t())
        if need_dcores:
            dcores = core_gradients(t, u, cores, index, scaling)
        if need_dx:
            w = products.cores(t, cores, index, scaling, False)
            if weight is None and not quant:
                dx = products.thin(w, a.t()).to(dy.dtype)
            else:
                sums = None if onto is None else onto.view(-1, a.shape[1])
                dx = products.extended_transposed(rows, weight, (quant, layout), w, a, sums)
            dx = shaped(dx, dy)
    return dx, dcores


def compute_group(
    products: Products,
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    index: Tensor,
    scalings: list[float],
) -> list[Tensor]:
    """The y_j [..., m_j], then the u_j [M, r], computed member by member."""
    bias_or_none: list[Any] = list(biases) or [None] * len(a)
    members = zip(weights, a, cores, b, bias_or_none, scalings, strict=True)
    results = [
        compute(products, x, weight, *NO_QUANT, a_j, stack, b_j, bias, index, scaling)
        for weight, a_j, stack, b_j, bias, scaling in members
    ]
    return [y for y, _ in results] + [u for _, u in results]


def differentiate_group(
    products: Products,
    dys: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    us: list[Tensor],
    scalings: list[float],
    index: Tensor,
    need_dx: bool,
    need_dcores: bool,
) -> list[Tensor]:
    """dx = Σ_j dy_j W_j + w_j A_j, all terms accumulated in one dx, then the dR_jk."""
    dx, dcores = None, []
    for dy, weight, a_j, stack, b_j, u, scaling in zip(dys, weights, a, cores, b, us, scalings, strict=True):
        given = weight, *NO_QUANT, a_j, stack, b_j, u, index, scaling
        dx, dcore = differentiate(products, dy, *given, need_dx, need_dcores, dx if need_dx else None)
        dcores.append(dcore)
    return [cast(Tensor, dx), *dcores]


def kernels(of: Callable[[torch.dtype], Products]) -> list[tuple[str, Callable[..., Any]]]:
    """The ops' kernels, of a backend's products for a dtype."""

    def _on(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Tensor | list[Tensor], *given: Any) -> Any:
            return function(of((first[0] if isinstance(first, list) else first).dtype), first, *given)

        return call

    functions: tuple[Callable[..., Any], ...] = (compute, differentiate, compute_group, differentiate_group)
    return list(zip(OPS, map(_on, functions), strict=True))


KERNELS = kernels(lambda dtype: EAGER)


def register() -> None:
    """Register for every device; CompositeExplicitAutograd leaves autograd to the op's own formula."""
    register_backend("eager", KERNELS, ("CompositeExplicitAutograd",))
