"""The gradient accumulator's kernel: for CUDA, and for an explicit backend under Triton's interpreter."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .. import gradient_ops  # noqa: F401  defines its ops
from ..ops import register_backend
from . import eager_gradients
from .triton import check_call, missing, or_eager


def gradient_add(dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
    """total [m, n] fp32 (+)= dyᵀ x."""
    from lorasb.kernels import gradients

    gradients.gradient_add(_checked(dy, x, total), x, total, fresh)


def gradient_signs(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and nonzero places of total + dyᵀ x, as words; and Σ G², zeros, not finite."""
    from lorasb.kernels import gradients

    return gradients.gradient_signs(_checked(dy, x, total), x, total, fresh)


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
    pairs = {
        "gradient_add": (gradient_add, eager_gradients.gradient_add),
        "gradient_signs": (gradient_signs, eager_gradients.gradient_signs),
    }
    register_backend(
        "triton",
        [(op, kernel) for op, (kernel, _) in pairs.items()],
        ("CUDA", "CPU"),
        auto=[(op, or_eager(kernel, plain)) for op, (kernel, plain) in pairs.items()],
        auto_keys=("CUDA",) if importlib.util.find_spec("triton") else (),
        missing=missing,
    )
