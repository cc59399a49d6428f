"""Plain torch, for every device: the fallback, and the reference of speed for the kernels.

The adapter's small product accumulates onto the base GEMM's result (`beta=1`), both ways, where the plain chain writes
both and adds them into a third.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...ops.registry import register_backend


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: casts were made before the op."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_masks = threading.local()  # set while a call stands in for the kernels


@contextmanager
def kernel_masks() -> Iterator[None]:
    """Inside, dropout keeps what the kernels would keep: one direction may have been theirs."""
    _masks.of_kernels = True
    try:
        yield
    finally:
        _masks.of_kernels = False


def philox_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """The kernels' mask [M, n]: Philox-4x32-10 of the seed at counter (column, row, 0, 0), as a number in [0, 1)."""
    low = 0xFFFFFFFF
    c0 = torch.arange(shape[1], device=device)[None].expand(shape).clone()
    c1 = torch.arange(shape[0], device=device)[:, None].expand(shape).clone()
    c2 = c3 = torch.zeros(shape, dtype=torch.int64, device=device)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wrapped to 64 bits, whose upper half the shift brings down
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    signed = torch.where(c0 > 0x7FFFFFFF, low - c0, c0)  # -x - 1 of a negative 32-bit number
    return signed.to(torch.float32) * 4.6566127342e-10 >= dropout


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor, device: torch.device) -> Tensor:
    """The elements that dropout keeps, from a seed: the same mask in forward and backward, and none is stored."""
    if getattr(_masks, "of_kernels", False):
        return philox_mask(shape, dropout, int(seed), device)
    generator = torch.Generator(device=device).manual_seed(int(seed))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - dropout, generator=generator)


def times_core(left: Tensor, core: Tensor, scale: float) -> Tensor:
    """`left @ (scale · core)`, the scaled core rounded to left's dtype: its product is rounded to that in any case."""
    return left @ (core if scale == 1.0 else core * scale).to(left.dtype)


def core_gradient(t: Tensor, u: Tensor, core: Tensor, scale: float) -> Tensor:
    """dR = s·tᵀ u: summed in fp32, and for bf16 rounded to it once, as the plain chain's is; fp16 would overflow."""
    half = t.dtype == torch.bfloat16
    dcore = (t.t() @ u).to(core.dtype) if half else t.to(core.dtype).t() @ u.to(core.dtype)
    return dcore if scale == 1.0 else dcore.mul_(scale)


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [M, n] in the leading shape of `like`; no view to autograd, so that callers may write into it in place."""
    return torch.ops.aten._unsafe_view.default(rows, (*like.shape[:-1], rows.shape[1]))


def forward(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + s·u Rᵀ Bᵀ + bias [..., out] and u = x Aᵀ [M, r]."""
    with no_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        if seed is None:
            u, scale = rows @ a.t(), scaling
        else:
            u, scale = (rows * keep_mask(rows.shape, dropout, seed, x.device)) @ a.t(), scaling / (1.0 - dropout)
        v = times_core(u, core.t(), scale)
        if weight is None:
            y = v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
        else:
            y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
            y.addmm_(v, b.t())
    return shaped(y, x), u


def backward(
    dy: Tensor,
    weight: Tensor | None,
    a: Tensor,
    core: Tensor,
    b: Tensor,
    u: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dcore: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is returned empty."""
    with no_autocast(dy):
        rows = dy.reshape(-1, dy.shape[-1])
        scale = scaling if seed is None else scaling / (1.0 - dropout)
        t = rows @ b
        dx, dcore = dy.new_empty((0,)), core.new_empty((0,))
        if need_dcore:
            dcore = core_gradient(t, u, core, scale)
        if need_dx:
            w = times_core(t, core, scale)
            if seed is not None:
                dx = w @ a
                dx.mul_(keep_mask(dx.shape, dropout, seed, dx.device))
                dx = dx if weight is None else dx.addmm_(rows, weight)
            else:
                dx = w @ a if weight is None else (rows @ weight).addmm_(w, a)
            dx = shaped(dx, dy)
    return dx, dcore


def group_forward(
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    biases: list[Tensor],
    scalings: list[float],
) -> list[Tensor]:
    """The members one after another: y_i [..., m_i], then u_i [M, r]."""
    each: list[Tensor | None] = list(biases) or [None] * len(a)
    members = zip(weights, a, cores, b, each, scalings, strict=True)
    results = [forward(x, w, a_i, core, b_i, bias, s, 0.0, None) for w, a_i, core, b_i, bias, s in members]
    return [y for y, _ in results] + [u for _, u in results]


def group_backward(
    dys: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    us: list[Tensor],
    scalings: list[float],
    need_dx: bool,
    need_dcore: bool,
) -> list[Tensor]:
    """dx = Σ_i dy_i W_i + (s_i·t_i R_i) A_i in one tensor, where autograd would add one a member; then dR_i."""
    dx, dcores = dys[0].new_empty((0,)), []
    with no_autocast(dx):
        for i, (dy, weight, factor, core, scale) in enumerate(zip(dys, weights, a, cores, scalings, strict=True)):
            rows = dy.reshape(-1, dy.shape[-1])
            t = rows @ b[i]
            dcores.append(core_gradient(t, us[i], core, scale) if need_dcore else core.new_empty((0,)))
            if need_dx:
                w = times_core(t, core, scale)
                dx = rows @ weight if i == 0 else dx.addmm_(rows, weight)
                dx.addmm_(w, factor)
    return [shaped(dx, dys[0]) if need_dx else dx, *dcores]


KERNELS = (
    ("linear", forward),
    ("linear_backward", backward),
    ("linear_group", group_forward),
    ("linear_group_backward", group_backward),
)


def register() -> None:
    """Register for every device, below autograd."""
    register_backend("eager", KERNELS, ("CompositeExplicitAutograd",))
