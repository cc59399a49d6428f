"""One layer's gradient to its factors, and what they keep of it."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...layers.linear import LoRASBLinear
from ..linalg.sign_bits import SignBits
from ..linalg.svd import OVERSAMPLE, energies, full_precision, leading_triplets, signed_core, truncated_svd
from ..report.init_report import LayerReport
from .methods import Factors, first_step, start_share

FACTS = 6  # Σ G², number of nonzero signs, zeros, seconds, stability, share of η


class Gradient(Protocol):
    """What is known of a layer's ΣG: everything, or what a cache kept."""

    @property
    def squares(self) -> float:
        """‖G‖²."""

    @property
    def zeros(self) -> int:
        """Exact zeros."""

    def signs(self) -> SignBits:
        """sign(G)."""

    def value(self) -> Tensor:
        """G [out, in]."""

    def curve(self, u: Tensor, vt: Tensor) -> Tensor:
        """For k = 1, 2, ...: ‖U_kᵀ G V_k‖²."""

    def half_signs(self) -> tuple[SignBits, SignBits] | None:
        """Signs over each half of the samples."""


@dataclass(frozen=True)
class Recipe:
    """How gradients become factors: of which adapter, η, the update rule, the seed of the SVDs, the longest start."""

    adapter: str
    lr: float
    update: str
    seed: int
    longest: float | None = None

    def seed_of(self, name: str) -> int:
        """A layer's own seed, whichever other layers there are."""
        return self.seed + zlib.crc32(name.encode())


@torch.no_grad()
def factor(name: str, gradient: Gradient, layer: LoRASBLinear, recipe: Recipe) -> tuple[Factors, Tensor]:
    """Factors, and measurements [3·q + 6] in fp64.

    They are: σ of what was factored, energies of sign(G) and of G in the leading 1, 2, ... q triplets (NaN where a
    cache does not know), then the facts.
    """
    started, r = time.perf_counter(), layer.r[recipe.adapter]
    signs = gradient.signs()
    with full_precision():
        return _factor(name, gradient, signs, layer, recipe, r, started)


def _factor(
    name: str, gradient: Gradient, signs: SignBits, layer: LoRASBLinear, recipe: Recipe, r: int, started: float
) -> tuple[Factors, Tensor]:
    matrix = signs if recipe.update == "adamw" else gradient.value()
    triplets = leading_triplets(matrix, r, recipe.seed_of(name))
    share = start_share(triplets.first(r).s, recipe.longest)
    factors = first_step(triplets, r, share * recipe.lr, layer.scaling[recipe.adapter])
    q = len(triplets.s)
    of_sign = triplets.s.square().cumsum(0) if recipe.update == "adamw" else energies(signed_core(signs, triplets))
    of_grad = torch.full((q,), float("nan"), dtype=torch.float64)
    known = gradient.curve(triplets.u, triplets.vt)[:q]
    of_grad[: len(known)] = known.double().cpu()
    overlap = stability(gradient.half_signs(), r, recipe.seed_of(name))
    facts = [gradient.squares, signs.squares, gradient.zeros, time.perf_counter() - started, overlap, share]
    return factors, torch.cat((triplets.s.double().cpu(), of_sign.double().cpu(), of_grad, _fp64(facts)))


def count_triplets(layer: LoRASBLinear, adapter: str) -> int:
    """How many triplets are measured of a layer."""
    return min(layer.r[adapter] + OVERSAMPLE, layer.in_features, layer.out_features)


def describe(name: str, layer: LoRASBLinear, adapter: str, measured: Tensor) -> LayerReport:
    """The report of what `factor` measured."""
    q, r = (len(measured) - FACTS) // 3, layer.r[adapter]
    sigma, of_sign, of_grad = measured[: 3 * q].view(3, q)
    squares, signs, zeros, seconds, overlap, share = measured[3 * q :].tolist()
    sign_curve = tuple(_short(value / max(signs, 1.0)) for value in of_sign.tolist())
    grad_curve = tuple(_short(value / squares) for value in of_grad.tolist() if value == value)
    return LayerReport(
        name, (layer.out_features, layer.in_features), r,
        sign_curve[r - 1], grad_curve[r - 1] if len(grad_curve) >= r else None,
        tuple(_short(value) for value in sigma[:r].tolist()), int(zeros), seconds,
        tuple(_short(value) for value in sigma[r:].tolist()), sign_curve, grad_curve,
        None if overlap != overlap else overlap, start=_short(share),
    )  # fmt: skip


def stability(halves: tuple[SignBits, SignBits] | None, r: int, seed: int) -> float:
    """How much the rank-r subspaces of two halves of the samples overlap: 1 for the same, about r/n for unrelated ones.

    The mean of ‖U₁ᵀU₂‖²/r and ‖V₁ᵀV₂‖²/r; NaN where halves were not asked for.
    """
    if halves is None:
        return float("nan")
    first, second = (truncated_svd(half, r, seed) for half in halves)
    left = (first.u.t() @ second.u).square().sum()
    return float((left + (first.vt @ second.vt.t()).square().sum()) / (2 * r))


def _fp64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _short(value: float) -> float:
    """Eight digits are more than a report needs."""
    return float(f"{value:.8g}")
