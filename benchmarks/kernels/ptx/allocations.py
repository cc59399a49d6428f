"""Which bytes of fresh tensors nobody has written: tensors that the library makes with `new_empty` and its like."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from .formats import BITS, Array


@dataclass
class Fresh:
    """A storage that was made empty."""

    storage: Any
    content: Array
    written: Array


class Tracker:
    """Storages that the kernels' own host code made empty since `clear`: what kernels alone write."""

    def __init__(self) -> None:
        self._fresh: dict[int, Fresh] = {}

    def clear(self) -> None:
        """Forget all, and let their memory go."""
        self._fresh.clear()

    def made(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that was made empty."""
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":  # what traces has no memory
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes():
            content = bytes_of(storage).view(BITS[tensor.element_size()]).copy()
            self._fresh[storage.data_ptr()] = Fresh(storage, content, np.zeros(content.nbytes, bool))
        return tensor

    def initialized(self, pointer: int, content: Array) -> Array | None:
        """A flag a byte of a storage's content; None where all of it was written."""
        fresh = self._fresh.get(pointer)
        if fresh is None:
            return None
        changed = content.view(fresh.content.dtype) != fresh.content  # an element has been written as a whole
        fresh.written |= np.repeat(changed, fresh.content.itemsize)
        return fresh.written

    def update(self, pointer: int, written: Array) -> None:
        """A launch has written these bytes too."""
        fresh = self._fresh.get(pointer)
        if fresh is not None:
            fresh.written |= written

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what `torch.empty`, `torch.empty_like` and `Tensor.new_empty` make inside the block."""
        with ExitStack() as stack:
            for owner, name in MAKERS:
                stack.enter_context(mock.patch.object(owner, name, self._noting(getattr(owner, name))))
            yield

    def _noting(self, original: Any) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            tensor = original(*arguments, **options)
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))
            return self.made(tensor) if caller.startswith(HOST_CODE) else tensor

        return make


HOST_CODE = ("lorasb.kernels", "lorasb.backends.triton")
MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


def bytes_of(storage: Any) -> Array:
    """The memory of a storage."""
    return np.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)
