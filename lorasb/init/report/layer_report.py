"""The report of one layer; `InitReport` holds one for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """The report of one layer. Energies are fractions of a squared Frobenius norm within span(B) x span(A).

    Attributes:
        name: name of the layer in the base model.
        shape: (out_features, in_features).
        rank: r.
        energy_sign: fraction of ‖sign(ΣG)‖²; None if no gradient was taken.
        energy_grad: fraction of ‖ΣG‖²; None likewise, or if a cache was made at a smaller rank.
        singular_values: the r leading ones of the matrix that was factored.
        zeros: number of entries of ΣG that are exactly zero.
        seconds: duration of the SVD.
        beyond: up to 32 further singular values, from the oversampling of the SVD.
        curve_sign: energy_sign at ranks 1, 2, ..., as far as measured.
        curve_grad: energy_grad at ranks 1, 2, ..., as far as measured.
        stability: overlap of the subspaces from two halves of the samples; None if not measured.
        fallback: replacement for the gradient if no sample reached the layer ("weight"), else None.
        start: factor on η of the first step (`longest_start`); None if no gradient was taken.
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
