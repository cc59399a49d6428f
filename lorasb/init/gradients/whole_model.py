"""The accumulate strategy: passes through the whole model, each with the sums of as many targets as a budget allows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..linalg.moment_sketch import sketch_bytes
from .accumulator import GradientSums
from .task import Work


def accumulate(work: Work, layers: dict[str, nn.Module], budget_bytes: float) -> Iterator[GradientSums]:
    """Sums of targets, one subset per pass, from the last layer to the first.

    Args:
        work: model and samples.
        layers: targets to be summed, by name.
        budget_bytes: bytes that the sums of one pass may take; a pass always takes at least one layer.

    Yields:
        Sums of the layers that backward reached.
    """
    for subset in passes(layers, budget_bytes / (2 if work.halves else 1), work.sketch_rank):
        with GradientSums(subset, work.halves, sketches=work.sketches) as sums:
            for piece in work.pieces:
                sums.muted, sums.first_half = not piece.counts, piece.first_half
                work.backward(piece)
                work.tick()
        yield sums


def passes(layers: dict[str, nn.Module], budget_bytes: float, sketch_rank: int = 0) -> list[dict[str, nn.Module]]:
    """Subsets of consecutive layers whose fp32 sums fit into a budget, from the last layer to the first.

    Backward ends at the lowest layer that has a hook, so a pass over late layers is shorter.
    """
    subsets: list[dict[str, nn.Module]] = []
    used = 0.0
    for name in reversed(layers):
        size = sum_bytes(layers[name], sketch_rank)
        if not subsets or used + size > budget_bytes:
            subsets.append({})
            used = 0.0
        subsets[-1][name] = layers[name]
        used += size
    return subsets


def sum_bytes(layer: nn.Module, sketch_rank: int = 0) -> int:
    """Bytes of a layer's ΣG [out, in] in fp32, and of its sketches of second moments for a rank, if that is not 0."""
    size: int = 4 * layer.in_features * layer.out_features  # type: ignore[operator, assignment]
    return size + (sketch_bytes((layer.out_features, layer.in_features), sketch_rank) if sketch_rank else 0)  # type: ignore[arg-type]
