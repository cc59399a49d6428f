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
from .measurements import Measurements, Scalars
from .methods import Factors, first_step, start_share


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
def factor(name: str, gradient: Gradient, layer: LoRASBLinear, recipe: Recipe) -> tuple[Factors, Measurements]:
    """A layer's B, R and A from its gradient (Eq. 6-8), and what they keep of it."""
    started, r, seed = time.perf_counter(), layer.r[recipe.adapter], recipe.seed_of(name)
    signs = gradient.signs()
    with full_precision():
        triplets = leading_triplets(signs if recipe.update == "adamw" else gradient.value(), r, seed)
        share = start_share(triplets.first(r).s, recipe.longest)
        factors = first_step(triplets, r, share * recipe.lr, layer.scaling[recipe.adapter])
        of_sign = triplets.s.square().cumsum(0) if recipe.update == "adamw" else energies(signed_core(signs, triplets))
        of_gradient = _up_to(gradient.curve(triplets.u, triplets.vt), len(triplets.s))
        overlap = stability(gradient.half_signs(), r, seed)
    scalars = Scalars(
        squares=gradient.squares,
        sign_squares=signs.squares,
        zeros=gradient.zeros,
        seconds=time.perf_counter() - started,
        stability=overlap,
        start=share,
    )
    return factors, Measurements(triplets.s.double().cpu(), of_sign.double().cpu(), of_gradient, scalars)


def _up_to(known: Tensor, count: int) -> Tensor:
    """The first `count` of what is known, in fp64; NaN after its end."""
    filled = torch.full((count,), float("nan"), dtype=torch.float64)
    known = known[:count]
    filled[: len(known)] = known.double().cpu()
    return filled


def count_triplets(layer: LoRASBLinear, adapter: str) -> int:
    """How many triplets are measured of a layer."""
    return min(layer.r[adapter] + OVERSAMPLE, layer.in_features, layer.out_features)


def stability(halves: tuple[SignBits, SignBits] | None, r: int, seed: int) -> float:
    """How much the rank-r subspaces of two halves of the samples overlap: 1 for the same, about r/n for unrelated ones.

    The mean of ‖U₁ᵀU₂‖²/r and ‖V₁ᵀV₂‖²/r; NaN where halves were not asked for.
    """
    if halves is None:
        return float("nan")
    first, second = (truncated_svd(half, r, seed) for half in halves)
    left = (first.u.t() @ second.u).square().sum()
    return float((left + (first.vt @ second.vt.t()).square().sum()) / (2 * r))
