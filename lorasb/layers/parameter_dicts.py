"""Parameter dicts for A, B and R by adapter name, which enforce that A and B are frozen and R is fp32 or wider.

PEFT, transformers' loader and `load_state_dict(assign=True)` assign parameters of their own, trainable ones for A and
B and 16-bit ones for R. All of them arrive at `__setattr__`: `nn.ParameterDict.__setitem__` calls setattr as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import is_loaded, mark_loaded
from ..utils.precision import SIXTEEN_BIT


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
            loaded = is_loaded(value)  # the new parameter has to carry the mark
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
            if loaded:
                mark_loaded(value)
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


def merged(weight: Tensor, deltas: Sequence[Tensor], names: Sequence[str], sign: float = 1.0) -> Tensor:
    """W + sign·Σ deltas, summed in the deltas' dtype and returned in W's."""
    total = weight
    for delta in deltas:
        total = total + sign * delta  # type promotion widens a 16-bit W to the delta's fp32
    result = total.to(weight.dtype)
    if not torch.isfinite(result).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {' and '.join(names)} seems to be broken: merging gives "
            f"weights that are not finite in {weight.dtype}; the weights were left as they are. Check the adapter's "
            "training, or merge into a wider dtype"
        )
    return result
