"""`lora_sb_linear`: the adapted linear as a function, with the checks that every backend relies on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends  # noqa: F401  registers the kernels
from .limits import MAX_RANK
from .ops import current_backend, linear_op

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def lora_sb_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_R: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias (paper, Eq. 3).

    Gradients: with u = x Aᵀ, t = dy B and w = s·t R, dR = s·tᵀ u and dx = dy W + w A. W, A, B and bias are frozen:
    they get none. Kept for backward: u [M, r], not x.

    Args:
        x: [..., in], fp64, fp32, bf16 or fp16; one to four dimensions, M = 0 included.
        weight: W [out, in] in x's dtype, or None for the adapter's part alone.
        lora_A: [r, in] in x's dtype.
        lora_R: [r, r], fp32 whatever x's dtype (fp64 for fp64).
        lora_B: [out, r] in x's dtype.
        bias: [out] in x's dtype.
        scaling: s.
        dropout: probability of dropping an element of the adapter's input; the mask is regenerated in backward.

    Under autocast x, W, A, B and bias are cast as `F.linear` would cast them; R is not.

    Returns:
        y [..., out] in x's dtype.

    Raises:
        ValueError: shapes, ranks or devices that do not fit together.
        TypeError: dtypes that do not fit together.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, weight, lora_A, lora_B, bias = _autocast(x, weight, lora_A, lora_B, bias)
    _check(x, weight, lora_A, lora_R, lora_B, bias)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu") if dropout > 0.0 else None
    return linear_op(current_backend())(x, weight, lora_A, lora_R, lora_B, bias, scaling, dropout, seed)[0]


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


def _check(x: Tensor, weight: Tensor | None, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if a.dim() != 2 or b.dim() != 2 or core.dim() != 2 or a.shape[0] > MAX_RANK:
        raise ValueError(
            f"expected lora_A [r, in], lora_R [r, r] and lora_B [out, r] with r <= {MAX_RANK}, "
            f"got {_shape(a)}, {_shape(core)} and {_shape(b)}"
        )
    r, features_in, features_out = a.shape[0], a.shape[1], b.shape[0]
    if b.shape[1] != r or core.shape != (r, r):
        raise ValueError(f"ranks differ: lora_A {_shape(a)}, lora_R {_shape(core)}, lora_B {_shape(b)}")
    if x.dim() < 1 or x.shape[-1] != features_in:
        raise ValueError(f"expected x [..., {features_in}] (in_features of lora_A), got {_shape(x)}")
    if weight is not None and weight.shape != (features_out, features_in):
        raise ValueError(f"expected weight [{features_out}, {features_in}], got {_shape(weight)}")
    if bias is not None and bias.shape != (features_out,):
        raise ValueError(f"expected bias [{features_out}], got {_shape(bias)}")
    _check_kinds(x, {"weight": weight, "lora_A": a, "lora_B": b, "bias": bias}, core)


def _check_kinds(x: Tensor, others: dict[str, Tensor | None], core: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"expected x in fp64, fp32, bf16 or fp16, got {x.dtype}")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"expected {name} in x's dtype {x.dtype}, got {tensor.dtype}: cast one of the two")
    if not core.is_floating_point():
        raise TypeError(f"expected lora_R in fp32, got {core.dtype}")
    for name, tensor in {**others, "lora_R": core}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"expected {name} on x's device {x.device}, got {tensor.device}: move one of the two")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
