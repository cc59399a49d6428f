"""Through the whole model: as many passes over subsets of the targets as a memory budget asks for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .accumulator import GradientSums
from .task import Work


def accumulate(work: Work, layers: dict[str, nn.Module], room: float) -> Iterator[GradientSums]:
    """Sums of targets, one subset a pass, from the last layer to the first.

    Args:
        work: model and samples.
        layers: targets whose sums are wanted.
        room: bytes that the sums of one pass may take; one layer is always taken.

    Yields:
        Sums of the layers that backward reached.
    """
    for subset in passes(layers, room / (2 if work.halves else 1)):
        with GradientSums(subset, work.halves) as sums:
            for piece in work.pieces:
                sums.muted, sums.first_half = not piece.counts, piece.first_half
                work.backward(piece)
                work.tick()
        yield sums


def passes(layers: dict[str, nn.Module], room: float) -> list[dict[str, nn.Module]]:
    """Subsets whose fp32 sums fit, in reverse: later layers need less of the graph."""
    found: list[dict[str, nn.Module]] = []
    used = 0.0
    for name in reversed(layers):
        size = sum_bytes(layers[name])
        if not found or used + size > room:
            found.append({})
            used = 0.0
        found[-1][name] = layers[name]
        used += size
    return found


def sum_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's sum in fp32."""
    return 4 * layer.in_features * layer.out_features  # type: ignore[operator, return-value]
