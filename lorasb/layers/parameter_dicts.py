"""Where a layer keeps A, B and R by adapter name, so that whatever assigns to them keeps our rules.

PEFT, transformers' loader and state dicts all create parameters of their own: trainable ones for A and B, 16-bit ones
for R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils.dtypes import HALVES

LOADED = "_is_hf_initialized"  # transformers marks a parameter that it has loaded


class FrozenFactors(nn.ParameterDict):
    """A or B by adapter name: frozen, whoever assigns."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            value.requires_grad_(False)
        super().__setattr__(name, value)


class Cores(nn.ParameterDict):
    """R by adapter name: never in 16 bits, where its updates would vanish."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.dtype in HALVES:
            loaded = getattr(value, LOADED, False)
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
            if loaded:
                setattr(value, LOADED, True)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Cores:
        """`model.to(torch.bfloat16)` moves R and leaves its precision."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new: torch.Tensor = fn(tensor)
            return tensor.to(new.device) if new.dtype in HALVES else new

        super()._apply(moved, recurse)
        return self


def placed_like(target: Any, value: torch.Tensor) -> torch.Tensor:
    """The value, which every process has, sharded as the target is (FSDP2); as it is where the target is whole."""
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device, target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
