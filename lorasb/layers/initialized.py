"""Adapters that are not initialized: they compute the base's result, and raise where they would be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..utils.dtypes import SIXTEEN_BIT
from .preconditioner import EquivalentGradient


def has_values(a: Tensor) -> bool:
    """False for the zeros of an adapter that was saved before it was initialized."""
    a = a.detach()
    a = a.to_local() if hasattr(a, "to_local") else a  # a DTensor's own shard
    return a.is_meta or a.numel() == 0 or bool(a.any())


def guarded_core(layer: Any, name: str) -> Tensor:
    """R of an adapter for a forward, with the gradient that it is to get (Theorem 3, if `equivalent_gradient`).

    Args:
        layer: a `LoRASBLinear`, which imports this module.
        name: of the adapter.

    Raises:
        RuntimeError: the adapter would be trained before it is initialized.
    """
    core: Tensor = layer._modules["lorasb_R"]._parameters[name]
    if core.dtype in SIXTEEN_BIT:  # as asked: products take fp32 or wider, and the gradient is rounded to R's dtype
        core = core.float()
    if not torch.is_grad_enabled():
        return core
    initialized = layer.is_initialized(name)
    if core.requires_grad and not initialized:
        core = _guard_uninitialized(core, name, layer.training)
    # Not before initialization: A and B are zero then, and AAᵀ and BᵀB singular.
    return (
        EquivalentGradient.apply(core, *layer.preconditioner(name)) if layer.equivalent[name] and initialized else core
    )


def _guard_uninitialized(core: Tensor, name: str, training: bool) -> Tensor:
    """Raise in training mode; in evaluation mode return a view of R whose gradient hook raises.

    Evaluating an uninitialized adapter is legitimate and gives the base's result, with gradients enabled or not.
    """
    error = RuntimeError(
        f"adapter {name!r} has not been initialized: its A, B and R are zero and would learn nothing. "
        "Call lorasb.initialize(model, dataloader, lr=...) before training, or load a saved adapter"
    )
    if training:
        raise error

    def raise_error(_: Tensor) -> None:
        raise error

    core = core.view_as(core)  # a hook on the parameter itself would outlive this forward and collect with each one
    core.register_hook(raise_error)
    return core
