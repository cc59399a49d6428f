"""Parameter dicts for A, B and R by adapter name, which enforce that A and B are frozen and R is fp32 or wider.

PEFT, transformers' loader and `load_state_dict(assign=True)` assign parameters of their own, trainable ones for A and
B and 16-bit ones for R. All of them arrive at `__setattr__`: `nn.ParameterDict.__setitem__` calls setattr as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils.dtypes import SIXTEEN_BIT

LOADED = "_is_hf_initialized"  # attribute that transformers' loader sets on a parameter that it has loaded


class FrozenFactors(nn.ParameterDict):
    """A or B by adapter name, never requiring gradients."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            value.requires_grad_(False)
        super().__setattr__(name, value)


class Cores(nn.ParameterDict):
    """R by adapter name, not in 16 bits, where small updates would round to nothing, unless that was asked for.

    Attributes:
        stored_16bit: names of adapters whose R may have 16 bits: PEFT's `autocast_adapter_dtype=False`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored_16bit: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.dtype in SIXTEEN_BIT and name not in self.stored_16bit:
            loaded = getattr(value, LOADED, False)  # the new parameter has to carry the mark
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
            if loaded:
                setattr(value, LOADED, True)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Cores:
        """Move R; of a cast to 16 bits (`model.to(torch.bfloat16)`) only the change of device is applied."""

        # `_apply` may set `parameter.data` in place, which does not pass through `__setattr__`.
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            new: torch.Tensor = fn(tensor)
            return tensor.to(new.device) if new.dtype in SIXTEEN_BIT else new

        super()._apply(move_only, recurse)
        return self


def shard_like(target: Any, value: torch.Tensor) -> torch.Tensor:
    """A full tensor sharded like the target, if that is a DTensor of FSDP2; else the tensor itself."""
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: every rank has the same full tensor and takes its own shard, without communication.
    value = value.to(target.device, target.dtype)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
