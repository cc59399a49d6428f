"""Writing factors into layers as a transaction: an exception restores the previous A, R and B of all layers."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from ...constants import FACTORS
from ...layers.linear import LoRASBLinear
from .held_back import emptied
from .methods import Factors


class Staging:
    """A context manager that rolls back every `write` if it is left by an exception.

    Factors of zeros, as uninitialized layers have, are not copied: on the first initialization a rollback takes no
    memory.

    Args:
        adapter: name of the adapter whose factors are written.
        held_back: share of r whose directions are written as zeros.
    """

    def __init__(self, adapter: str, held_back: float = 0.0) -> None:
        self.adapter, self.held_back = adapter, held_back
        # (layer, its `initialized` flag, A, R and B on the host; None for zeros), in the order written
        self._previous: list[tuple[LoRASBLinear, bool, list[Tensor | None]]] = []

    def write(self, layer: LoRASBLinear, factors: Factors) -> None:
        """Write B, R and A into a layer, and remember its previous ones."""
        parameters = [getattr(layer, factor)[self.adapter] for factor in FACTORS]
        # `copy=True`: on a CPU layer `to` would return the parameter itself, which is overwritten below.
        values = [p.detach().to("cpu", copy=True) if bool(p.detach().any()) else None for p in parameters]
        self._previous.append((layer, layer.initialized[self.adapter], values))
        b, core, a, _ = emptied(factors, self.held_back)
        layer.set_factors(self.adapter, b, core, a)

    def __enter__(self) -> Staging:
        return self

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            return
        # In reverse, so that a layer that was written twice ends with its first values.
        for layer, initialized, values in reversed(self._previous):
            for name, value in zip(FACTORS, values, strict=True):
                # In place: an optimizer that exists already holds these parameters.
                parameter = getattr(layer, name)[self.adapter]
                parameter.zero_() if value is None else parameter.copy_(value)
            layer.initialized[self.adapter] = initialized
