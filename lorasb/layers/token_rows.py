"""`Rows`: the adapter name of each row of a batch, and its mapping to the rows of a layer's input.

A layer may get the batch's rows [B, ...] or their tokens flattened [B·T, in]. Other layers reorder or select tokens,
where a matching number of rows would be a coincidence: the mapping is None wherever it cannot be known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

TOKENS_FIRST = ("fsmt", "led", "longformer", "xlnet")  # `config.model_type` of models whose layers get [T, B, in]


def other_length(inputs: int, names: int) -> str:
    """The message for adapter_names that are not one for each row, in PEFT's words, and the fix."""
    return (
        f"Length of `adapter_names` should be the same as the number of inputs, but got {names} and {inputs} "
        "respectively: give a name for each row of the batch"
    )


@dataclass(frozen=True)
class Rows:
    """The adapter name of each of n rows."""

    names: tuple[str, ...]  # the distinct names
    index: Tensor  # [n], int64 on the CPU: each row's index into `names`
    slots: Tensor | None = None  # [names], int64: where a bank has each of them, or -1; None without a bank
    basis: str = ""  # the adapter whose A and B those of the bank have, and whose trained modules serve them, too

    @classmethod
    def of(cls, names: Sequence[str]) -> Rows:
        """Rows from a list with one name per row."""
        distinct = tuple(sorted(set(names)))
        return cls(distinct, torch.tensor([distinct.index(name) for name in names], dtype=torch.int64))

    def __len__(self) -> int:
        return self.index.shape[0]  # not len(): torch's takes microseconds, and every layer asks

    def same_as(self, other: Rows) -> bool:
        """True if every row has the same name."""
        return self.names == other.names and torch.equal(self.index, other.index)

    # Cached, as every layer asks: a batch has one `Rows` for all of them.
    @cached_property
    def places(self) -> Tensor | None:
        """[n]: each row's slot in the bank, or -1; None without a bank."""
        return None if self.slots is None else self.slots[self.index]

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Names that no bank has."""
        if self.slots is None:
            return self.names
        return tuple(name for name, slot in zip(self.names, self.slots.tolist(), strict=True) if slot < 0)

    def to_list(self) -> list[str]:
        """One name per row, of adapters of the model: of those in a bank their basis."""
        others = set(self.others)
        return [name if name in others else self.basis for name in (self.names[i] for i in self.index.tolist())]

    def select(self, rows: Tensor) -> Rows:
        """The names of a subset of the rows, in the order of the indices `rows` [k]."""
        return replace(self, index=self.index[rows.to(self.index.device)])

    def repeat_interleave(self, repeats: int) -> Rows:
        """Each row's name `repeats` times in turn, as for flattened tokens or for beams."""
        return replace(self, index=self.index.repeat_interleave(repeats))


def chooses_tokens(name: str) -> bool:
    """True if a module's name is that of a routed expert, which gets a selection of the tokens."""
    # Shared experts get all tokens.
    return any(re.search("expert", component) and "shared" not in component for component in name.split("."))


def rows_of(x: Tensor, rows: Rows, outer: torch.Size | None, tokens_first: bool) -> Rows | None:
    """The names for the rows of a layer's input x [n, ..., in]; None if the mapping is ambiguous."""
    if len(rows.names) == 1:  # any selection or order of tokens has the same name
        fits = x.dim() == 2 or tokens_first or len(x) % len(rows) == 0
        return replace(rows, index=rows.index[:1].expand(len(x))) if fits else None
    if x.dim() > 2:
        # With B = T, [B, T, in] and [T, B, in] have the same shape; strides of a transpose give the latter away.
        unclear = x.shape[0] == x.shape[1] and (tokens_first or x.stride(0) < x.stride(1))
        return rows if len(x) == len(rows) and not unclear else None
    if outer is not None and outer[0] == len(rows) and len(x) == outer[0] * outer[1]:  # flattened to [B·T, in]
        return rows.repeat_interleave(outer[1])
    return rows if len(x) == len(rows) else None
