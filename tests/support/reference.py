"""A reference for what the layer computes, in as few lines as possible and without the library's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    """Inputs of one adapted linear, and the gradient of its output."""

    x: Tensor
    weight: Any  # W [m, n], dense or quantized, or None
    a: Tensor
    core: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float
    dy: Tensor

    def to(self, target: torch.dtype | str) -> Case:
        """The same numbers in a dtype, or on a device."""
        return replace(self, **{name: t.to(target) for name, t in vars(self).items() if isinstance(t, Tensor)})

    def double(self) -> Case:
        return self.to(torch.float64)


def make_case(
    shape: tuple[int, ...],
    n: int,
    m: int,
    r: int,
    dtype: torch.dtype,
    bias: bool = True,
    scaling: float = 0.7,
    seed: int = 0,
) -> Case:
    """Random inputs: x [*shape, n], orthonormal A [r, n] and B [m, r] where sizes allow it, a small R."""
    g = torch.Generator().manual_seed(seed)
    core_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    a = torch.linalg.qr(normal(n, r)).Q.t().contiguous()
    b = torch.linalg.qr(normal(m, r)).Q.contiguous()
    return Case(
        normal(*shape, n).to(dtype),
        (normal(m, n) / n**0.5).to(dtype),
        a.to(dtype),
        (normal(r, r) * 0.3).to(core_dtype),
        b.to(dtype),
        normal(m).to(dtype) if bias else None,
        scaling,
        normal(*shape, m).to(dtype),
    )


def forward(c: Case) -> Tensor:
    """y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias."""
    y = c.x @ c.weight.t() + c.scaling * (c.x @ c.a.t() @ c.core.t().to(c.x.dtype) @ c.b.t())
    return y if c.bias is None else y + c.bias


def gradients(c: Case) -> tuple[Tensor, Tensor]:
    """dx = dy W + s·dy B R A and dR = s·(dy B)ᵀ (x Aᵀ), from their formulas."""
    rows, dy = c.x.reshape(-1, c.x.shape[-1]), c.dy.reshape(-1, c.dy.shape[-1])
    dx = dy @ c.weight + c.scaling * (dy @ c.b @ c.core.to(dy.dtype) @ c.a)
    return dx.reshape(c.x.shape), c.scaling * ((dy @ c.b).t() @ (rows @ c.a.t()))


def by_formulas(c: Case) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dR."""
    return forward(c), *gradients(c)


def plain_chain(c: Case) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dR of the chain written naively, in the case's own dtype, and differentiated by autograd."""
    x, core = c.x.clone().requires_grad_(True), c.core.clone().requires_grad_(True)
    y = torch.nn.functional.linear(x, c.weight, c.bias)
    y = y + c.scaling * (((x @ c.a.t()) @ core.t().to(x.dtype)) @ c.b.t())
    return y.detach(), *torch.autograd.grad(y, (x, core), c.dy)


def by_rows(compute: Callable[[Case], tuple[Tensor, ...]], cases: list[Case], index: list[int] | None) -> list[Tensor]:
    """The y_j, dx and dR_j of layers that read the same x, one member at a time; with an index, also row by row."""

    def of(case: Case) -> tuple[Tensor, ...]:
        if index is None:
            return compute(case)
        rows = zip(case.x, index, case.dy, strict=True)
        found = [compute(replace(case, x=x, core=case.core[k] * (k >= 0), dy=dy)) for x, k, dy in rows]
        dcore = torch.zeros_like(case.core)
        for k, one in zip(index, found, strict=True):
            dcore[k] += one[2] * (k >= 0)
        return torch.stack([one[0] for one in found]), torch.stack([one[1] for one in found]), dcore

    ys, dxs, dcores = zip(*map(of, cases), strict=True)
    return [*ys, torch.stack(dxs).sum(0), *dcores]
