"""What the factoring of one layer measured: sent between processes as one fp64 tensor, and told as a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...layers.linear import LoRASBLinear
from ..report.layer_report import LayerReport


class Scalars(NamedTuple):
    """Numbers of one layer.

    Attributes:
        squares: ‖ΣG‖².
        sign_squares: ‖sign(ΣG)‖², the number of its nonzero entries.
        zeros: exact zeros of ΣG.
        seconds: of the factoring.
        stability: overlap of the subspaces of two halves of the samples; NaN where it was not asked for.
        start: the share of η that the first step was taken with.
    """

    squares: float
    sign_squares: float
    zeros: float
    seconds: float
    stability: float
    start: float


@dataclass(frozen=True)
class Measurements:
    """Of one layer, at the q leading triplets of the matrix that was factored.

    Attributes:
        sigma: singular values [q].
        of_sign: ‖U_kᵀ sign(ΣG) V_k‖² for k = 1 ... q [q].
        of_gradient: ‖U_kᵀ ΣG V_k‖² [q]; NaN from the rank on up to which a cache knows it.
        scalars: the other numbers.
    """

    sigma: Tensor
    of_sign: Tensor
    of_gradient: Tensor
    scalars: Scalars

    @staticmethod
    def size(q: int) -> int:
        """Entries of `to_tensor` at q triplets."""
        return 3 * q + len(Scalars._fields)

    def to_tensor(self) -> Tensor:
        """All of it as one fp64 tensor on the CPU, for other processes."""
        curves = (self.sigma, self.of_sign, self.of_gradient)
        return torch.cat([*(curve.double().cpu() for curve in curves), torch.tensor(self.scalars, dtype=torch.float64)])

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Measurements:
        """Read what `to_tensor` made."""
        q = (len(packed) - len(Scalars._fields)) // 3
        sigma, of_sign, of_gradient = packed[: 3 * q].view(3, q)
        return cls(sigma, of_sign, of_gradient, Scalars(*packed[3 * q :].tolist()))

    def report(self, name: str, layer: LoRASBLinear, adapter: str) -> LayerReport:
        """The layer's report: energies as shares of the squared norms."""
        r, scalars = layer.r[adapter], self.scalars
        sigma = tuple(map(_rounded, self.sigma.tolist()))
        curve_sign = tuple(_rounded(value / max(scalars.sign_squares, 1.0)) for value in self.of_sign.tolist())
        known = [value for value in self.of_gradient.tolist() if not math.isnan(value)]
        curve_grad = tuple(_rounded(value / scalars.squares) for value in known)
        return LayerReport(
            name=name,
            shape=(layer.out_features, layer.in_features),
            rank=r,
            energy_sign=curve_sign[r - 1],
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
    """Eight digits are more than a report needs."""
    return float(f"{value:.8g}")
