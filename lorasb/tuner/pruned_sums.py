"""Sums of adapters after pruning, TIES, DARE and by magnitude: PEFT's arithmetic on R's, or on the updates of W."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SVD = "_svd"  # suffix of the kinds that prune updates of W [out, in], not R's
SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Pruning:
    """What is pruned and how; PEFT's names.

    Attributes:
        kind: of `PRUNING`.
        density: share of the entries that stay, in [0, 1].
        majority_sign_method: how TIES elects an entry's sign: by the sum ("total") or by votes ("frequency").
    """

    kind: str
    density: float
    majority_sign_method: str = "total"

    def check(self) -> None:
        """Raise a ValueError for values that cannot be."""
        density = self.density
        if not isinstance(density, int | float) or isinstance(density, bool) or not 0.0 <= density <= 1.0:
            raise ValueError(f"{self.kind} takes density in [0, 1], the share of entries that stay, got {density!r}")
        if self.majority_sign_method not in SIGN_METHODS:
            methods = " or ".join(map(repr, SIGN_METHODS))
            raise ValueError(f"majority_sign_method must be {methods}, got {self.majority_sign_method!r}")

    def add(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum of tensors of one shape. DARE draws from torch's global random state."""
        factors, density = torch.tensor(weights, device=tensors[0].device, dtype=tensors[0].dtype), self.density
        if self.kind == "ties":
            return ties(list(tensors), factors, density, self.majority_sign_method)  # type: ignore[arg-type]
        if self.kind == "dare_ties":
            return dare_ties(list(tensors), factors, density, self.majority_sign_method)  # type: ignore[arg-type]
        add = dare_linear if self.kind == "dare_linear" else magnitude_prune
        return add(list(tensors), factors, density)


@dataclass(frozen=True)
class Decomposition:
    """How the SVD of an update is taken; PEFT's names.

    Attributes:
        clamp: quantile that entries of U Σ and Vᵀ are clamped to, or None.
        full_matrices, driver: of torch.linalg.svd.
    """

    clamp: float | None = None
    full_matrices: bool = False
    driver: str | None = None

    def factors(self, update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U Σ [out, r] and Vᵀ [r, in] of an update [out, in]; r is `rank` or less."""
        u, s, vt = torch.linalg.svd(update, full_matrices=self.full_matrices, driver=self.driver)
        rank = min(rank, len(s))
        left, right = u[:, :rank] * s[:rank], vt[:rank]
        if self.clamp is None:
            return left, right
        bound = float(torch.cat((left.flatten(), right.flatten())).double().quantile(self.clamp))
        return left.clamp(-bound, bound), right.clamp(-bound, bound)


def pruned_update(updates: Sequence[Tensor], weights: Sequence[float], pruning: Pruning | None) -> Tensor:
    """Σ weights · updates [out, in], pruned if so asked."""
    if pruning is not None:
        return pruning.add(updates, weights)
    factors = torch.tensor(weights, device=updates[0].device, dtype=updates[0].dtype)
    return task_arithmetic(list(updates), factors)
