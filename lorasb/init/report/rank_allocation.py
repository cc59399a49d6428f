"""Allocating ranks to layers: for a fraction of the energy, or for a number of trained parameters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .layer_report import LayerReport


@dataclass(frozen=True)
class RankSuggestion:
    """Ranks for `LoRASBConfig(rank_pattern=...)`.

    Attributes:
        rank_pattern: rank by layer name.
        trained_parameters: Σ r².
        energy: mean over layers of the fraction that these ranks capture.
        short: layers that capture less than asked for even at the largest rank that was measured.
    """

    rank_pattern: dict[str, int]
    trained_parameters: int
    energy: float
    short: tuple[str, ...] = ()


def suggest(layers: Sequence[LayerReport], energy: float | None, parameters: int | None, of: str) -> RankSuggestion:
    """See `InitReport.suggest_ranks`."""
    if (energy is None) == (parameters is None):
        raise ValueError("expected an energy target or a number of parameters: suggest_ranks(energy=0.8)")
    if of not in ("sign", "grad"):
        raise ValueError(f"of must be 'sign' or 'grad', got {of!r}")
    curves = {layer.name: getattr(layer, f"curve_{of}") for layer in layers}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        raise ValueError("these factors came from no gradient: there is no energy to choose ranks by")
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"expected an energy target in (0, 1], got {energy!r}")
        ranks = {name: _smallest_rank(curve, energy) for name, curve in curves.items()}
    else:
        ranks = _best_ranks(curves, int(parameters or 0))
    captured = {name: curves[name][r - 1] for name, r in ranks.items()}
    short = tuple(name for name, value in captured.items() if energy is not None and value < energy)
    return RankSuggestion(ranks, sum(r * r for r in ranks.values()), sum(captured.values()) / len(captured), short)


def _smallest_rank(curve: Sequence[float], energy: float) -> int:
    return next((k for k, value in enumerate(curve, 1) if value >= energy), len(curve))


def _best_ranks(curves: dict[str, Sequence[float]], parameters: int) -> dict[str, int]:
    """Greedy allocation: the next rank goes to the layer that gains most energy per added parameter.

    Every layer starts at rank 1, and the queue holds one candidate per layer, its next rank.
    """
    if parameters < len(curves):
        raise ValueError(f"expected at least one parameter for each of {len(curves)} layers, got {parameters}")
    ranks, used = dict.fromkeys(curves, 1), len(curves)
    queue = [(-_gain(curve, 1), name) for name, curve in curves.items() if len(curve) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        added = 2 * ranks[name] + 1  # (r + 1)² - r²
        if used + added > parameters:
            continue  # this layer is done, but one of a smaller rank may still fit
        used += added
        ranks[name] += 1
        if ranks[name] < len(curves[name]):
            heapq.heappush(queue, (-_gain(curves[name], ranks[name]), name))
    return ranks


def _gain(curve: Sequence[float], r: int) -> float:
    """Energy gained by rank r + 1 over rank r, per added parameter."""
    return (curve[r] - curve[r - 1]) / (2 * r + 1)
