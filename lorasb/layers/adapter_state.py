"""State of a layer's adapter, the dictionaries of its A, R and B with their dtypes, and the gradient that R gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..utils.precision import SIXTEEN_BIT


@dataclass
class AdapterState:
    """An adapter of a layer."""

    r: int  # rank
    scaling: float  # s
    made_with: float  # the s that it was made with
    dropout: float = 0.0  # probability of dropping an element of x on the adapter's path
    equivalent: bool = False  # whether Theorem 3's closed form is applied to R's gradient
    wide_factors: bool = False  # whether A and B are in fp32 over a base in 16 bits
    # whether A, R and B have values; ask `AdaptedLayer.is_initialized`, which sees loaded ones, too
    initialized: bool = False
    basis: str | None = None  # the adapter whose A and B it has; None if they belong to it
    # of Theorem 3, with the state of A, B and s that it was computed from; None before
    preconditioner: tuple[object, Tensor, Tensor] | None = field(default=None, repr=False)


class Scales(dict[str, float]):
    """The s by adapter name, which may be set, as in PEFT's layers."""

    def __init__(self, adapters: dict[str, AdapterState]) -> None:
        super().__init__({name: state.scaling for name, state in adapters.items()})
        self._adapters = adapters

    def __setitem__(self, name: str, scaling: float) -> None:
        self._adapters[name].scaling = scaling
        super().__setitem__(name, scaling)


class EquivalentGradient(torch.autograd.Function):
    """The identity on R, whose backward maps g to left·g·right (all [r, r])."""

    @staticmethod
    def forward(ctx: FunctionCtx, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return left @ grad @ right, None, None


def refuse_training(core: Tensor, name: str, training: bool) -> Tensor:
    """Raise for an uninitialized adapter in training mode; else return a view of R whose gradient raises."""
    # Evaluating an uninitialized adapter is legitimate and gives the base's result, with gradients enabled or not.
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


def has_values(a: Tensor) -> bool:
    """False for the zeros of an adapter that was saved before it was initialized."""
    a = a.detach()
    a = a.to_local() if hasattr(a, "to_local") else a  # a DTensor's own shard
    return a.is_meta or a.numel() == 0 or bool(a.any())


class FrozenFactors(nn.ParameterDict):
    """A or B by adapter name, never requiring gradients."""

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Parameter) and value.requires_grad:
            value.requires_grad_(False)
        super().__setattr__(name, value)


class Cores(nn.ParameterDict):
    """R by adapter name, not in 16 bits, where small updates would round to nothing, unless that was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stored_16bit: set[str] = set()  # adapters whose R may have 16 bits: PEFT's `autocast_adapter_dtype=False`

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Parameter) and value.dtype in SIXTEEN_BIT and name not in self.stored_16bit:
            marks = vars(value)  # set from outside, as transformers' loaded flag
            value = nn.Parameter(value.detach().float(), requires_grad=value.requires_grad)
            vars(value).update(marks)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        """Move R; of a cast to 16 bits (`model.to(torch.bfloat16)`) only the change of device is applied."""

        # `_apply` may set `parameter.data` in place, which does not pass through `__setattr__`.
        def move_only(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if new.dtype in SIXTEEN_BIT else new

        super()._apply(move_only, recurse)
        return self
