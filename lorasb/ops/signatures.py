"""Signatures of calls: all that checks and the choice of a kernel depend on. A known call needs neither again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import torch as private

PLAIN = (Tensor, torch.nn.Parameter)
MOST = 1 << 12  # signatures that are kept, of up to 4 KB each; every number of tokens makes one a layer shape


def is_intercepted() -> bool:
    """True under a dispatch or function mode, a transform or torch.jit.trace: kernels must not be called."""
    if private.dispatch_modes() or private.function_modes():
        return True
    return is_transformed() or private.tracing_state() is not None


def is_transformed() -> bool:
    """True under a functorch transform (`torch.func`) or forward-mode AD, for which the ops have no rules."""
    return private.transforms_active() or private.forward_level() >= 0


def metadata_in_python(*operands: Any) -> Hashable:
    """Dtype, device, shape and strides of tensors, lists of them and None; None for anything else."""
    found: list[Hashable] = []
    for operand in operands:
        is_list = type(operand) in (list, tuple)
        inner = _described(operand if is_list else (operand,))
        if inner is None:
            return None
        found += (inner,) if is_list else inner
    return tuple(found)


def _described(tensors: Sequence[Any]) -> tuple[Hashable, ...] | None:
    found: list[Hashable] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) in PLAIN and tensor.layout is torch.strided and not (tensor.is_neg() or tensor.is_nested):
            found += tensor.dtype, tensor.device, tensor.shape, tensor.stride()
        else:
            return None
    return tuple(found)


metadata: Callable[..., Hashable] = metadata_in_python  # or the extension's, ten times as fast


def of_in_python(x: Any, *others: Any) -> Hashable:
    """The metadata of a call's operands; None, too, where something intercepts ops, or x meets more than kernels."""
    if is_intercepted() or (type(x) in PLAIN and _has_a_key_of_its_own(x)):
        return None
    return metadata_in_python(x, *others)


def _has_a_key_of_its_own(tensor: Tensor) -> bool:
    """True if the dispatcher unwraps it or fills it with zeros before a kernel."""
    if private.is_wrapped(tensor):
        return True
    return private.is_zerotensor(tensor) or private.is_functional(tensor)


of: Callable[..., Hashable] = of_in_python


def use(signature: Callable[..., Hashable], faster_metadata: Callable[..., Hashable]) -> None:
    """Replace both functions by faster ones, which are equal where these are."""
    global of, metadata
    of, metadata = signature, faster_metadata


class Known:
    """Signatures that have passed a check; None is never one of them."""

    def __init__(self) -> None:
        self._signatures: set[Hashable] = set()

    def has(self, signature: Hashable) -> bool:
        return signature in self._signatures

    def add(self, signature: Hashable) -> None:
        """Remember it, unless it is None."""
        if signature is None:
            return
        if len(self._signatures) >= MOST:
            self._signatures.clear()
        self._signatures.add(signature)
