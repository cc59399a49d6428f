"""The gradient accumulator's kernel: for CUDA, and for an explicit backend under Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..eager import weight_gradient as eager_weight_gradient
from .linear import check_call, register_pairs


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [m, n] fp32 (+)= dyᵀ x."""
    from lorasb.kernels import weight_gradient as kernels

    kernels.gradient_add(_checked(dy, x, total), x, total, fresh)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and nonzero places of total + dyᵀ x, as words; and Σ G², zeros, not finite."""
    from lorasb.kernels import weight_gradient as kernels

    return kernels.gradient_signs(_checked(dy, x, total), x, total, fresh)


def _checked(dy: Tensor, x: Tensor, total: Tensor | None) -> Tensor:
    """dy in x's dtype.

    Raises:
        TypeError: a dtype that the kernel does not have.
    """
    check_call(x)
    if total is not None and total.dtype != torch.float32:
        raise TypeError(f"backend 'triton' expected an fp32 sum, got {total.dtype}: backend('eager') takes it")
    return dy.to(x.dtype)


def register() -> None:
    """Register for CUDA and the CPU, and for `auto` on CUDA with eager torch behind."""
    register_pairs(
        {
            "gradient_add": (gradient_add, eager_weight_gradient.gradient_add),
            "gradient_signs": (gradient_signs, eager_weight_gradient.gradient_signs),
        }
    )
