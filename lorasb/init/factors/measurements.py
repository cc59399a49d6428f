"""Measurements of one layer's SVD: sent between ranks as one fp64 tensor, and turned into a `LayerReport`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...layers.linear import LoRASBLinear
from ..report.layer_report import LayerReport


class Scalars(NamedTuple):
    """Scalar measurements of one layer, in the order of the packed tensor.

    Attributes:
        squares: ‖ΣG‖².
        sign_squares: ‖sign(ΣG)‖², the number of its nonzero entries.
        zeros: number of entries of ΣG that are exactly zero.
        seconds: duration of the SVD and the measurements.
        stability: overlap of the subspaces of two halves of the samples; NaN if not measured.
        start: factor on η of the first step (`longest_start`).
    """

    squares: float
    sign_squares: float
    zeros: float
    seconds: float
    stability: float
    start: float


@dataclass(frozen=True)
class Measurements:
    """Measurements of one layer at the q leading singular triplets of the matrix that was factored.

    Attributes:
        sigma: singular values [q].
        sign_energies: ‖U_kᵀ sign(ΣG) V_k‖² for k = 1 ... q [q].
        gradient_energies: ‖U_kᵀ ΣG V_k‖² for k = 1 ... q [q]; NaN beyond the rank that a cache was measured at.
        scalars: the scalar measurements.
    """

    sigma: Tensor
    sign_energies: Tensor
    gradient_energies: Tensor
    scalars: Scalars

    @staticmethod
    def size(q: int) -> int:
        """Number of entries of `to_tensor` at q triplets."""
        return 3 * q + len(Scalars._fields)

    def to_tensor(self) -> Tensor:
        """Pack into one fp64 tensor [size(q)] on the CPU, so that a broadcast takes one call."""
        curves = (self.sigma, self.sign_energies, self.gradient_energies)
        return torch.cat([*(curve.double().cpu() for curve in curves), torch.tensor(self.scalars, dtype=torch.float64)])

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Measurements:
        """Unpack `to_tensor`."""
        q = (len(packed) - len(Scalars._fields)) // 3
        sigma, sign_energies, gradient_energies = packed[: 3 * q].view(3, q)
        return cls(sigma, sign_energies, gradient_energies, Scalars(*packed[3 * q :].tolist()))

    def report(self, name: str, layer: LoRASBLinear, adapter: str) -> LayerReport:
        """The layer's report, with energies as fractions of the squared Frobenius norms."""
        r, scalars = layer.r[adapter], self.scalars
        sigma = tuple(map(_rounded, self.sigma.tolist()))
        curve_sign = tuple(_rounded(value / max(scalars.sign_squares, 1.0)) for value in self.sign_energies.tolist())
        measured = [value for value in self.gradient_energies.tolist() if not math.isnan(value)]
        curve_grad = tuple(_rounded(value / scalars.squares) for value in measured)
        return LayerReport(
            name=name,
            shape=(layer.out_features, layer.in_features),
            rank=r,
            energy_sign=curve_sign[r - 1],
            # a cache made at a smaller rank has no energy at this one
            energy_grad=curve_grad[r - 1] if len(curve_grad) >= r else None,
            singular_values=sigma[:r],
            zeros=int(scalars.zeros),
            seconds=scalars.seconds,
            beyond=sigma[r:],
            curve_sign=curve_sign,
            curve_grad=curve_grad,
            stability=None if math.isnan(scalars.stability) else scalars.stability,
            start=_rounded(scalars.start),
        )


def _rounded(value: float) -> float:
    """Eight significant digits, to keep the JSON short: fp32 has fewer."""
    return float(f"{value:.8g}")
