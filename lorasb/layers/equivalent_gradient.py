"""Theorem 3 as a function: the equivalent gradient of R, for factors that need not be orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import LoRASBLinear


@torch.no_grad()
def equivalent_gradient(layer: LoRASBLinear, adapter_name: str | None = None) -> Tensor:
    """The gradient of R whose effect on W is closest to the full gradient (Theorem 3).

    g_R* = (1/s²) (BᵀB)⁻¹ g_R (AAᵀ)⁻¹ minimizes ‖s B g A − ∇W L‖; with orthonormal factors it is g_R / s².

    Args:
        layer: a layer whose R has a gradient.
        adapter_name: name of the adapter; the first active one if None.

    Returns:
        [r, r] in R's dtype. If the layer was made with `equivalent_gradient=True`, this is R's gradient as it is.

    Raises:
        ValueError: R has no gradient yet.
    """
    name = adapter_name or layer.active_adapters[0]
    gradient = layer.lorasb_R[name].grad
    if gradient is None:
        raise ValueError(f"adapter {name!r} has no gradient: call loss.backward() first")
    if layer.equivalent[name]:
        return gradient
    left, right = layer.preconditioner(name)
    return left @ gradient @ right
