"""The launches that the library makes for a shape, recorded on tensors that have no memory."""

from __future__ import annotations

import torch

from lorasb.kernels.launch import Mask, Members, backward, forward
from lorasb.kernels.plan import DTYPES, Plan, Shape, bucket, choice
from lorasb.kernels.recording import Launch, observed


def members(n: int, ms: tuple[int, ...], r: int, dtype: torch.dtype) -> Members:
    """Layers [m_i, n] of rank r on `meta`."""
    empty = {"device": "meta", "dtype": dtype}
    return Members(
        [torch.empty(m, n, **empty) for m in ms],
        [torch.empty(r, n, **empty) for _ in ms],
        [torch.empty(r, r, device="meta") for _ in ms],
        [torch.empty(m, r, **empty) for m in ms],
        [1.0] * len(ms),
    )


def plan_for(op: str, dtype: torch.dtype, M: int, n: int, ms: tuple[int, ...], r: int, arch: str, sms: int) -> Plan:
    """What the library would choose."""
    return choice(Shape(op, DTYPES[dtype], bucket(M), n, sum(ms), r, len(ms)), arch, sms)


def record(
    op: str,
    plan: Plan,
    dtype: torch.dtype,
    M: int,
    n: int,
    ms: tuple[int, ...],
    r: int,
    bias: bool = False,
    dropout: float = 0.0,
) -> list[Launch]:
    """The launches of one forward, or of one backward with dx and dR."""
    layers = members(n, ms, r, dtype)
    empty = {"device": "meta", "dtype": dtype}
    with observed(dry=True) as launches:
        if op == "forward":
            biases = [torch.empty(m, **empty) if bias else None for m in ms]
            forward(torch.empty(M, n, **empty), layers, biases, plan, Mask(dropout, 1))
        else:
            us = [torch.empty(M, r, **empty) for _ in ms]
            backward([torch.empty(M, m, **empty) for m in ms], layers, us, plan, True, True, Mask(dropout, 1))
    return launches
