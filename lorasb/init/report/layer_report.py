"""What an initialization kept of one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer. Energies are shares of a squared Frobenius norm that lie in span(B) x span(A).

    Attributes:
        shape: (out_features, in_features).
        energy_sign: share of sign(ΣG); None where no gradient was taken.
        energy_grad: share of ΣG itself; None likewise.
        singular_values: the leading r, of the matrix that was factored.
        zeros: exact zeros in ΣG.
        seconds: time of the factoring.
        beyond: up to 32 more singular values, measured on the way.
        curve_sign, curve_grad: the energies at ranks 1, 2, ... as far as they were measured.
        stability: overlap of the subspaces from two halves of the samples, where it was asked for.
        start: what share of η the first step was taken with (`longest_start`); None where no gradient was taken.
        fallback: what stood in for the gradient of a layer that no sample reached.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energy_sign: float | None
    energy_grad: float | None
    singular_values: tuple[float, ...]
    zeros: int
    seconds: float
    beyond: tuple[float, ...] = ()
    curve_sign: tuple[float, ...] = ()
    curve_grad: tuple[float, ...] = ()
    stability: float | None = None
    fallback: str | None = None
    start: float | None = None
