"""A layer's part of a bank of adapters: the columns that its R's have in the bank's storage."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, cast

from torch import Tensor


class Columns(NamedTuple):
    """Where a layer's R lies in a row of the bank: from `first` on, r² numbers."""

    first: int
    r: int


class LayerCores:
    """A layer's part of a bank, which the layer holds (`row_cores.StoredCores`)."""

    def __init__(self, bank: Any, columns: Columns) -> None:
        self.bank, self.basis = bank, bank.basis
        self._columns = slice(columns.first, columns.first + columns.r**2)
        self._shape = columns.r, columns.r
        self._seen: tuple[Tensor | None, Any] = (None, None)  # storage and its view, replaced together

    def stack(self) -> Tensor:
        """[capacity, r, r], a view; made again where the bank has grown."""
        whole, (seen, view) = self.bank.storage, self._seen
        if whole is not seen:
            view = whole[:, self._columns].unflatten(1, self._shape)
            self._seen = whole, view
        return cast(Tensor, view)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCores | None:
        """A part of the copied model's bank; None for a layer that is copied without its model."""
        bank = copy.deepcopy(self.bank, memo)
        if bank is None:
            return None
        new = object.__new__(LayerCores)
        vars(new).update(vars(self) | {"bank": bank, "_seen": (None, None)})
        return new
