"""Bytes of the tensors that are alive inside a block, and their peak: of real tensors, or of fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation returns, once, until it is freed.

    What a kernel allocates and frees inside one operation is not seen.

    Attributes:
        now: bytes of storages that are alive.
        peak: their maximum since the block began, or since `peak` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> bool:
        """False where it has been counted before."""
        if storage._cdata in self._seen:
            return False
        self._seen[storage._cdata] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)
        return True

    def _free(self, size: int) -> None:
        self.now -= size
