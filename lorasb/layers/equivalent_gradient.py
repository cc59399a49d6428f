"""Theorem 3: the gradient of R whose effect on W is closest to the full gradient, whatever the factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .linear import LoRASBLinear


class EquivalentGradient(torch.autograd.Function):
    """The identity, with backward g -> left g right."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return left @ grad @ right, None, None


@torch.no_grad()
def preconditioners(layer: LoRASBLinear, name: str) -> tuple[Tensor, Tensor]:
    """(BᵀB)⁻¹/s² and (AAᵀ)⁻¹ [r, r] of Theorem 3, in R's dtype; computed once for each value of A and B."""
    a, b, dtype = layer.lorasb_A[name], layer.lorasb_B[name], layer.lorasb_R[name].dtype
    key = (a.data_ptr(), a._version, b.data_ptr(), b._version, layer.scaling[name])
    cached = layer._preconditioners.get(name)
    if cached is None or cached[0] != key:
        wide_a, wide_b = a.double(), b.double()
        left = torch.linalg.inv(wide_b.t() @ wide_b) / layer.scaling[name] ** 2
        right = torch.linalg.inv(wide_a @ wide_a.t())
        cached = layer._preconditioners[name] = (key, left.to(dtype), right.to(dtype))
    return cached[1], cached[2]


@torch.no_grad()
def equivalent_gradient(layer: LoRASBLinear, adapter_name: str | None = None) -> Tensor:
    """The gradient of R whose effect on W is closest to the full gradient (Theorem 3).

    g_R* = (1/s²) (BᵀB)⁻¹ g_R (AAᵀ)⁻¹ minimizes ‖s B g A − ∇W L‖; with orthonormal factors it is g_R / s².

    Args:
        layer: a layer whose R has a gradient.
        adapter_name: which adapter; the first active one unless given.

    Returns:
        [r, r] in R's dtype. Where the layer was made with `equivalent_gradient=True`, R's gradient is this already.

    Raises:
        ValueError: R has no gradient yet.
    """
    name = adapter_name or layer.active_adapters[0]
    gradient = layer.lorasb_R[name].grad
    if gradient is None:
        raise ValueError(f"adapter {name!r} has no gradient: call loss.backward() first")
    if layer.equivalent[name]:
        return gradient
    left, right = preconditioners(layer, name)
    return left @ gradient @ right
