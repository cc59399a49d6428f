"""Signatures of calls: all that checks and the choice of a kernel depend on. A known call needs neither again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
MOST = 1 << 12  # signatures that are kept, of up to 4 KB each; every number of tokens makes one a layer shape


def is_intercepted() -> bool:
    """True under a mode, a functorch transform or torch.jit.trace, which have to meet the ops themselves."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


def metadata_in_python(*operands: Any) -> tuple[Hashable, ...] | None:
    """Dtype, device, shape and strides of tensors, of lists of them and of None.

    Returns:
        None where an operand is anything else: a subclass, a sparse or a lazily negated tensor, a list of lists.
    """
    found: list[Hashable] = []
    for operand in operands:
        if type(operand) in (list, tuple):
            if any(type(one) in (list, tuple) for one in operand) or (inner := metadata_in_python(*operand)) is None:
                return None
            found.append(inner)
        elif operand is None:
            found.append(None)
        elif type(operand) in PLAIN and operand.layout is torch.strided and not _has_a_key_of_its_own(operand):
            found += operand.dtype, operand.device, operand.shape, operand.stride()
        else:
            return None
    return tuple(found)


def _has_a_key_of_its_own(tensor: Tensor) -> bool:
    """True if the dispatcher does something else for it before a kernel: negates, unwraps, fills with zeros."""
    if tensor.is_neg() or tensor.is_nested or tensor._is_zerotensor() or tensor.is_conj():
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


metadata: Callable[..., Hashable] = metadata_in_python  # or the extension's, ten times as fast


def of_in_python(*operands: Any) -> Hashable:
    """The metadata of a call's operands; None, too, where something intercepts ops."""
    return None if is_intercepted() else metadata_in_python(*operands)


of: Callable[..., Hashable] = of_in_python


def use(signature: Callable[..., Hashable], faster_metadata: Callable[..., Hashable]) -> None:
    """Take both from elsewhere, equal where those of the functions here are equal."""
    global of, metadata
    of, metadata = signature, faster_metadata


class Known:
    """Signatures that have passed a check.

    >>> known = Known()
    >>> x = torch.ones(2, 3)
    >>> known.has(signature := of(x)), known.add(signature), known.has(of(x + 1))
    (False, None, True)
    """

    def __init__(self) -> None:
        self._signatures: set[Hashable] = set()

    def has(self, signature: Hashable) -> bool:
        """Whether it has been added; None never is."""
        return signature in self._signatures

    def add(self, signature: Hashable) -> None:
        """Remember it, unless it is None."""
        if signature is None:
            return
        if len(self._signatures) >= MOST:
            self._signatures.clear()
        self._signatures.add(signature)
