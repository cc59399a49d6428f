"""Whose row is it: from the names of a batch's rows to those of what a layer gets, or a refusal.

A layer may get the batch's rows [B, ...], or all their tokens in one list [B·T, in], row after row. Others reorder or
choose tokens, and a number of rows that is right by chance says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS_FIRST = ("fsmt", "led", "longformer", "xlnet")  # families whose layers get [T, B, in]


@dataclass(frozen=True)
class Rows:
    """Which adapter each of n rows asks for.

    Args:
        names: the distinct names.
        index: [n], of int64 on the CPU: the place of each row's name among them.
    """

    names: tuple[str, ...]
    index: Tensor

    @classmethod
    def of(cls, names: Sequence[str]) -> Rows:
        """From a name for each row."""
        distinct = tuple(sorted(set(names)))
        return cls(distinct, torch.tensor([distinct.index(name) for name in names], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.index)

    def each(self) -> list[str]:
        """A name for each row."""
        return [self.names[i] for i in self.index.tolist()]

    def taken(self, places: Tensor) -> Rows:
        """Those of the rows at `places`."""
        return Rows(self.names, self.index[places.to(self.index.device)])

    def repeated(self, times: int) -> Rows:
        """Each row's name `times` times in turn: for its tokens in one list."""
        return Rows(self.names, self.index.repeat_interleave(times))

    def as_many(self, count: int) -> Rows:
        """The one name that all rows have, for `count` of whatever."""
        return Rows(self.names, self.index[:1].expand(count))


def chooses_tokens(name: str) -> bool:
    """Whether a module's name says that it is an expert, which gets the tokens that were routed to it."""
    return any(re.search("expert", part) and "shared" not in part for part in name.split("."))


def rows_of(x: Tensor, rows: Rows, outer: torch.Size | None, tokens_first: bool) -> Rows | None:
    """The names for the rows of x [n, ..., in]; None where there is no telling whose they are.

    Args:
        x: what a layer gets.
        rows: of the batch.
        outer: the shape [B, T, ...] of what the nearest module around the layer got, if it was of that kind.
        tokens_first: the model is of a family whose layers may get [T, B, in].
    """
    if len(rows.names) == 1:
        fits = x.dim() == 2 or tokens_first or len(x) % len(rows) == 0
        return rows.as_many(len(x)) if fits else None
    if x.dim() > 2:
        unclear = x.shape[0] == x.shape[1] and (tokens_first or x.stride(0) < x.stride(1))
        return rows if len(x) == len(rows) and not unclear else None
    if outer is not None and outer[0] == len(rows) and len(x) == outer[0] * outer[1]:
        return rows.repeated(outer[1])
    return rows if len(x) == len(rows) else None
