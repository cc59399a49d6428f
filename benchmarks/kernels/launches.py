"""The launches that the library makes for a shape, recorded on tensors that have no memory."""

from __future__ import annotations

import torch

from lorasb.kernels.launcher import Launch, observed
from lorasb.kernels.linear import Mask, Members, backward, forward
from lorasb.kernels.linear_quantized import Quantized, dequantized
from lorasb.kernels.linear_quantized import backward as backward_quantized
from lorasb.kernels.linear_quantized import forward as forward_quantized
from lorasb.kernels.plan import DTYPES, LaunchPlan, Shape, bucket, choice
from lorasb.kernels.row_cores import RowProducts
from lorasb.kernels.weight_gradient import gradient_add, gradient_signs

SEED = 1 << 40  # for dropout: the library draws 63 bits, which a kernel takes as an i64


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(size, device="meta", dtype=dtype)


def members(n: int, ms: tuple[int, ...], r: int, dtype: torch.dtype, bias: bool = False) -> Members:
    """Layers [m_i, n] of rank r, without memory."""
    return Members(
        [empty(m, n, dtype=dtype) for m in ms],
        [empty(r, n, dtype=dtype) for _ in ms],
        [empty(r, r) for _ in ms],
        [empty(m, r, dtype=dtype) for m in ms],
        [empty(m, dtype=dtype) if bias else None for m in ms],
        [1.0] * len(ms),
    )


def plan_for(
    op: str, dtype: torch.dtype, M: int, n: int, ms: tuple[int, ...], r: int, arch: str, sms: int, quant: str = "none"
) -> LaunchPlan:
    """The launch plan that the library would choose."""
    return choice(Shape(op, DTYPES[dtype], bucket(M), n, sum(ms), r, len(ms), quant), arch, sms)


def record(
    op: str,
    plan: LaunchPlan,
    dtype: torch.dtype,
    M: int,
    n: int,
    ms: tuple[int, ...],
    r: int,
    bias: bool = False,
    dropout: float = 0.0,
) -> list[Launch]:
    """Record the launches of one forward, or of one backward with dx and dR."""
    layers, mask = members(n, ms, r, dtype, bias), Mask(dropout, (SEED,) * len(ms)) if dropout else Mask()
    with observed(dry=True) as launches:
        if op == "forward":
            forward(empty(M, n, dtype=dtype), layers, plan, mask)
        else:
            us = [empty(M, r, dtype=dtype) for _ in ms]
            backward([empty(M, m, dtype=dtype) for m in ms], layers, us, plan, True, True, mask)
    return launches


def record_gradient(dtype: torch.dtype, M: int, n: int, m: int, arch: str) -> list[Launch]:
    """Record a sum of gradients [m, n]: its last call and, if tiles divide it, also an earlier and a single one."""
    dy, x, total = empty(M, m, dtype=dtype), empty(M, n, dtype=dtype), empty(m, n)
    with observed(dry=True) as launches:
        gradient_signs(dy, x, total, False, arch)
        if M % 32 == m % 64 == n % 128 == 0:
            gradient_add(dy, x, total, False, arch)
            gradient_signs(dy, x, None, True, arch)
    return launches


def record_rows(plan: LaunchPlan, dtype: torch.dtype, n: int, m: int, r: int, rows: int, tokens: int) -> list[Launch]:
    """Record the launches that a forward and backward make only if each row has its own R."""
    layer, M = members(n, (m,), r, dtype), rows * tokens
    of_rows = RowProducts(empty(rows, r, r), torch.arange(rows), 1.0)
    with observed(dry=True) as launches:
        forward(empty(M, n, dtype=dtype), layer, plan, rows=[of_rows])
        dy, u = empty(M, m, dtype=dtype), empty(M, r, dtype=dtype)
        backward([dy], layer, [u], plan, True, True, rows=[of_rows])
    return [one for one in launches if one.name in ("times_row_cores", "row_core_gradients")]


def quantized_weight(m: int, n: int, nested: bool) -> Quantized:
    """W [m, n] in NF4 with blocks of 64, without memory."""
    blocks = -(-m * n // 64)
    absmax = empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    statistics = (empty(-(-blocks // 256)), empty(256), empty(1)) if nested else ()
    return Quantized((empty(m * n // 2, dtype=torch.uint8), absmax, empty(16), *statistics), (64, 256, 0), m, n)


def record_quantized(
    plan: LaunchPlan, dtype: torch.dtype, M: int, n: int, m: int, r: int, nested: bool
) -> list[Launch]:
    """Record the launches of one forward and backward over a 4-bit weight, and of a separate dequantization."""
    layer, weight = members(n, (m,), r, dtype), quantized_weight(m, n, nested)
    bare = layer._replace(weights=[None])
    with observed(dry=True) as launches:
        forward_quantized(empty(M, n, dtype=dtype), weight, bare, plan, Mask())
        backward_quantized(empty(M, m, dtype=dtype), weight, bare, empty(M, r, dtype=dtype), plan, (True, True), Mask())
        dequantized(weight, dtype)
    return [one for one in launches if one.arguments.get("weight") is not None]
