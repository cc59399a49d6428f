"""Theorem 3's closed form: an autograd function that applies it to R's gradient, and a cache of its two matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EquivalentGradient(torch.autograd.Function):
    """The identity on R, whose backward maps g to left·g·right (all [r, r])."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return left @ grad @ right, None, None


class Preconditioner:
    """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] of Theorem 3, cached until A, B or s changes."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._matrices: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def matrices(self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] in `dtype`, for A [r, in] and B [out, r].

        Computed in fp64, as forming the Gram matrix squares the factors' condition number.
        """
        # Pointers show that a parameter was replaced or moved, versions that it was written to in place.
        key = (a.data_ptr(), a._version, b.data_ptr(), b._version, scaling)
        if self._matrices is None or self._key != key:
            wide_a, wide_b = a.double(), b.double()
            left = torch.linalg.inv(wide_b.t() @ wide_b) / scaling**2
            right = torch.linalg.inv(wide_a @ wide_a.t())
            self._key, self._matrices = key, (left.to(dtype), right.to(dtype))
        return self._matrices
