"""The adapted linear in plain torch, for every device: the fallback of the other backends and their speed baseline.

In forward and backward, the adapter's small product accumulates onto the base GEMM's result (addmm with beta = 1). A
plain chain of linears writes both products and adds them into a third tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...ops.autocast import autocast_on
from ...ops.registry import register_backend


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, if it is on for the tensor's device: the arguments were cast before the op."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if autocast_on(kind) else nullcontext()


_dropout = threading.local()  # `philox` is set while eager computes in place of a Triton kernel


@contextmanager
def kernel_masks() -> Iterator[None]:
    """Inside, dropout uses the Triton kernels' mask, for a fallback in one direction whose other one ran a kernel."""
    _dropout.philox = True
    try:
        yield
    finally:
        _dropout.philox = False


def kernel_dropout(dropout: float) -> float:
    """The probability that the kernels' masks have: the nearest multiple of 2^-16, and 0 or 1 for nothing else."""
    if not 0.0 < dropout < 1.0:
        return dropout
    return min(max(round(dropout * 2**16), 1), 2**16 - 1) / 2**16


def philox_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """The Triton kernels' mask [M, n]: True where 16 random bits are at least dropout·2^16.

    They are half words of Philox-4x32-10, the lower half of a word first; counter (column // 8, row, 0, 0) serves eight
    columns. Words of 32 bits are held in int64.
    """
    low, (M, n) = 0xFFFFFFFF, shape
    c0 = torch.arange(-(-n // 8), device=device).expand(M, -1)
    c1 = torch.arange(M, device=device)[:, None].expand(c0.shape)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps, but keeps all 64 bits; `>> 32` is the high word
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack((c0, c1, c2, c3), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).view(M, -1)[:, :n]
    return halves >= kernel_dropout(dropout) * 2**16


def _kept(dropout: float) -> float:
    """The share of x that dropout keeps."""
    return 1.0 - (kernel_dropout(dropout) if getattr(_dropout, "philox", False) else dropout)


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor, device: torch.device) -> Tensor:
    """Mask [M, n] of the elements that dropout keeps. Backward regenerates it from the seed, so it is not stored."""
    if getattr(_dropout, "philox", False):
        return philox_mask(shape, dropout, int(seed), device)
    # A separate generator: the global random state advances by the draw of the seed alone.
    generator = torch.Generator(device=device).manual_seed(int(seed))
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1.0 - dropout, generator=generator)


def times_core(left: Tensor, core: Tensor, scale: float) -> Tensor:
    """`left @ (scale · core)` in left's dtype.

    The scaled core is rounded to left's dtype first, as the GEMM takes one dtype and would round its result to it.
    """
    return left @ (core if scale == 1.0 else core * scale).to(left.dtype)


def core_gradient(t: Tensor, u: Tensor, core: Tensor, scale: float) -> Tensor:
    """dR = s·tᵀ u [r, r] in R's dtype, or of several R's at once, t and u [K, M, r].

    In bf16 the GEMM sums in fp32 and rounds its result once, as autograd would. In fp16 that result, a sum over all
    tokens, could overflow: t and u [M, r] are widened instead.
    """
    in_bf16 = t.dtype == torch.bfloat16
    dcore = (t.mT @ u).to(core.dtype) if in_bf16 else t.to(core.dtype).mT @ u.to(core.dtype)
    return dcore if scale == 1.0 else dcore.mul_(scale)


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [M, n] reshaped to the leading dimensions of `like`.

    `_unsafe_view` shares the memory but is no view to autograd. A real view of a custom op's result could not be
    modified in place by callers.
    """
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
            u, scale = (rows * keep_mask(rows.shape, dropout, seed, x.device)) @ a.t(), scaling / _kept(dropout)
        v = times_core(u, core.t(), scale)
        if weight is None:
            y = v @ b.t() if bias is None else torch.addmm(bias, v, b.t())
        else:  # the base's product first: the small one accumulates onto it in place
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
    """dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; a gradient that is not needed is an empty tensor."""
    with no_autocast(dy):
        rows = dy.reshape(-1, dy.shape[-1])
        scale = scaling if seed is None else scaling / _kept(dropout)  # inverted dropout: no scaling in evaluation
        t = rows @ b
        dx, dcore = dy.new_empty((0,)), core.new_empty((0,))
        if need_dcore:
            dcore = core_gradient(t, u, core, scale)
        if need_dx:
            w = times_core(t, core, scale)
            if seed is not None:
                # The mask applies to the adapter's part alone, so that is computed first here.
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
    dropout: float,
    seeds: Tensor | None,
) -> list[Tensor]:
    """The y_i [..., m_i], then the u_i [M, r], computed member by member."""
    bias_or_none: list[Any] = list(biases) or [None] * len(a)
    members = zip(weights, a, cores, b, bias_or_none, scalings, strict=True)
    results = [
        forward(x, w, a_i, core, b_i, bias, s, dropout, seed_of(seeds, i))
        for i, (w, a_i, core, b_i, bias, s) in enumerate(members)
    ]
    return [y for y, _ in results] + [u for _, u in results]


def group_backward(
    dys: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    us: list[Tensor],
    scalings: list[float],
    dropout: float,
    seeds: Tensor | None,
    need_dx: bool,
    need_dcore: bool,
) -> list[Tensor]:
    """dx = Σ_i dy_i W_i + (s_i·t_i R_i) A_i, then the dR_i.

    All terms accumulate in one dx, where autograd would write a dx for each member and add them up. With dropout each
    member has a mask, and is computed alone.
    """
    if seeds is not None:
        return apart(backward, dys, weights, a, cores, b, us, scalings, dropout, seeds, need_dx, need_dcore)
    return group_backward_without_dropout(dys, weights, a, cores, b, us, scalings, need_dx, need_dcore)


def group_backward_without_dropout(
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
    """Compute the same as `group_backward`."""
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


def apart(
    backward: Callable[..., tuple[Tensor, Tensor]],
    dys: list[Tensor],
    weights: list[Tensor],
    a: list[Tensor],
    cores: list[Tensor],
    b: list[Tensor],
    us: list[Tensor],
    scalings: list[float],
    dropout: float,
    seeds: Tensor,
    need_dx: bool,
    need_dcore: bool,
) -> list[Tensor]:
    """The sum of the members' dx, then the dR_i, by a single layer's backward."""
    members: Any = zip(dys, weights, a, cores, b, us, scalings, strict=True)
    results = [backward(*member, dropout, seed_of(seeds, i), need_dx, need_dcore) for i, member in enumerate(members)]
    dx, *others = (dx for dx, _ in results)
    for other in others:
        dx = dx.add_(other) if need_dx else dx
    return [dx, *(dcore for _, dcore in results)]


def seed_of(seeds: Tensor | None, i: int) -> Tensor | None:
    """A member's seed [1]."""
    return None if seeds is None else seeds[i : i + 1]


KERNELS = (
    ("linear", forward),
    ("linear_backward", backward),
    ("linear_group", group_forward),
    ("linear_group_backward", group_backward),
)


def register() -> None:
    """Register for every device; CompositeExplicitAutograd leaves autograd to the ops' own formulas."""
    register_backend("eager", KERNELS, ("CompositeExplicitAutograd",))
