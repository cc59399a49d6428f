"""The A and B of a layer of vLLM, and its slots of R: y_i += B R_k A x_i, where k is the slot of token i."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as functional  # registers the backends
from ..backends import cpp
from ..kernels.block_sizes import padded_rank
from ..ops.registry import unavailable

GATHERED = 1024  # tokens whose R's torch's own operations gather at a time


class CoreSlots:
    """One A and B for each part of a layer (q, k and v in one, or gate and up), and an R of each in every slot.

    Args:
        factors: (A [r, in], B [out, r]) of each part on this rank; None for a part without an adapter.
        sizes: features of each part's output on this rank.
        count: slots.
        dtype: of A, B and the R's.
        device: of these.

    Raises:
        ValueError: the shapes of A and B are not the layer's.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Tensor, Tensor] | None],
        sizes: Sequence[int],
        in_features: int,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        pairs = {j: pair for j, pair in enumerate(factors) if pair is not None}
        r = self.r = max(a.shape[0] for a, _ in pairs.values())
        self.parts = list(pairs)
        self.first = [sum(sizes[:j]) for j in self.parts]  # columns of y where they begin
        self.A = torch.zeros((len(self.parts) * r, in_features), dtype=dtype, device=device)
        self.B = [torch.zeros((sizes[j], r), dtype=dtype, device=device) for j in self.parts]
        for rows, columns, (j, (a, b)) in zip(self.A.split(r), self.B, pairs.items(), strict=True):
            if a.shape[1:] != (in_features,) or b.shape[:1] != (sizes[j],):
                got = f"A {list(a.shape)} and B {list(b.shape)}"
                raise ValueError(f"expected A [r, {in_features}] and B [{sizes[j]}, r], got {got}: another base model")
            rows[: len(a)].copy_(a)
            columns[:, : b.shape[1]].copy_(b)
        self.numbers = torch.arange(len(self.parts), device=device)
        self.cores = torch.zeros((count, len(self.parts), r, r), dtype=dtype, device=device)

    def shared(self) -> dict[str, Tensor]:
        """The tensors that all adapters have."""
        return {"A": self.A, "numbers": self.numbers, **{f"B{j}": b for j, b in enumerate(self.B)}}

    def clear(self, slot: int) -> None:
        """R = 0 in a slot."""
        self.cores[slot] = 0

    def write(self, slot: int, cores: Sequence[Tensor | None]) -> None:
        """Write the R [r, r] of each part of the layer; None is 0, and a smaller one is padded."""
        for place, j in zip(self.cores[slot], self.parts, strict=True):
            core = cores[j]
            place.zero_()
            if core is not None:
                place[: len(core), : len(core)].copy_(core)

    def add_to(self, y: Tensor, x: Tensor, index: Tensor) -> None:
        """y_i += B R_k A x_i in place, k = index[i]; rows of -1 are left as they are.

        Args:
            y: [T, Σ sizes], in the slots' dtype.
            x: [T, in].
            index: [T], int64, on x's device; on a GPU its range is not checked.
        """
        if x.is_cpu and x.dtype != torch.float64 and cpp.missing() is None:
            cpp.add_rows(y, x, self.A, self.cores, self.B, self.first, index)
            return
        u, count = x @ self.A.t(), len(self.parts)
        cores = self.cores.flatten(0, 1)  # R of part p in slot k is number k·count + p
        if count > 1:
            index = (index.unsqueeze(1) * count + self.numbers).clamp_(min=-1).flatten()
        vs = times_cores(u.view(-1, self.r), cores, index).view(u.shape).split(self.r, 1)
        for v, b, first in zip(vs, self.B, self.first, strict=True):
            y[:, first : first + b.shape[0]].addmm_(v, b.t())


def times_cores(u: Tensor, cores: Tensor, index: Tensor) -> Tensor:
    """R_k u_i [T, r] of u [T, r] and cores [K, r, r], k = index[i]; zero where that is -1. Without gradients."""
    if u.is_cuda and unavailable("triton") is None:
        from ..kernels.row_cores import RowProducts

        out = RowProducts(cores, index, 1.0).times(u, True, u.new_empty((len(u), padded_rank(cores.shape[1]))))
        return out[:, : u.shape[1]]
    products = []
    for rows, places in zip(u.split(GATHERED), index.split(GATHERED), strict=True):
        chosen = cores.index_select(0, places.clamp(min=0))  # nothing here waits for a device: a CUDA graph can hold it
        products.append(torch.bmm(chosen, rows.unsqueeze(2)).squeeze(2).masked_fill_((places < 0).unsqueeze(1), 0.0))
    return torch.cat(products)
