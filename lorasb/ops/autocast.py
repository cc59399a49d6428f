"""Autocast as in `F.linear`: operands are cast before the checks and the ops, which require equal dtypes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compat import torch as private


def is_on(x: Tensor) -> bool:
    return private.any_autocast() and autocast_on(x.device.type)


def autocast_on(kind: str) -> bool:
    return kind != "meta" and torch.is_autocast_enabled(kind)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, if it is on for the tensor's device: the arguments were cast before the op."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if autocast_on(kind) else nullcontext()


def cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast casts the arguments of `F.linear`, which leaves fp64 alone."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


def cast_lists(x: Tensor, lists: list[list[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
    """x and lists of tensors, together, so that x is cast only once."""
    x, *flat = cast(x, *(tensor for tensors in lists for tensor in tensors))
    found = iter(flat)
    return x, [[next(found) for _ in tensors] for tensors in lists]
