"""Factors go into the layers as they are found; if the run does not finish, the layers get back what they had."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from ...constants import FACTORS
from ...layers.linear import LoRASBLinear
from .methods import Factors


class Staging:
    """A context manager: leaving it by an exception undoes every `write`.

    Layers that were not initialized hold zeros, which are not kept: memory does not grow with the number of layers.

    Args:
        adapter: whose factors are written.
    """

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self._before: list[tuple[LoRASBLinear, bool, list[Tensor | None]]] = []

    def write(self, layer: LoRASBLinear, factors: Factors) -> None:
        """Put B, R and A into a layer."""
        parts = [getattr(layer, part)[self.adapter] for part in FACTORS]
        kept = [part.detach().to("cpu", copy=True) if bool(part.detach().any()) else None for part in parts]
        self._before.append((layer, layer.initialized[self.adapter], kept))
        layer.set_factors(self.adapter, factors.b, factors.core, factors.a)

    def __enter__(self) -> Staging:
        return self

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            return
        for layer, initialized, kept in reversed(self._before):
            for name, value in zip(FACTORS, kept, strict=True):
                parameter = getattr(layer, name)[self.adapter]
                parameter.zero_() if value is None else parameter.copy_(value)
            layer.initialized[self.adapter] = initialized
