"""From one layer's gradient to its factors, and the energy that they capture."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...layers.linear import LoRASBLinear
from ..linalg.moment_sketch import MomentSketch
from ..linalg.sign_bits import SignBits
from ..linalg.svd import OVERSAMPLE, Triplets, energies, full_precision, leading_triplets, signed_core, truncated_svd
from .measurements import Measurements, Scalars
from .methods import Factors, first_step, projected_step, start_share


class Gradient(Protocol):
    """G = ΣG of a layer, as `factor` needs it: a `LayerSum` with all values, or a `CachedGradient` with signs only."""

    @property
    def squares(self) -> float:
        """‖G‖²."""

    @property
    def zeros(self) -> int:
        """Number of entries that are exactly zero."""

    def signs(self) -> SignBits:
        """sign(G)."""

    def value(self) -> Tensor:
        """G [out, in]."""

    def curve(self, u: Tensor, vt: Tensor) -> Tensor:
        """‖U_kᵀ G V_k‖² for k = 1, 2, ..., with U [out, q] and Vᵀ [q, in]."""

    @property
    def sketch(self) -> MomentSketch | None:
        """Second moments of the samples' own gradients, if they were summed."""

    def half_signs(self) -> tuple[SignBits, SignBits] | None:
        """Signs of the sums over each half of the samples; None if halves were not summed."""


@dataclass(frozen=True)
class Recipe:
    """How gradients become factors.

    Attributes:
        adapter: adapter name.
        lr: η of the simulated step.
        update: "adamw" (factor sign(G)), "sgd" (factor G), "per-sample" (second moments) or "none" (data-free).
        seed: seed of the SVDs.
        longest: see `longest_start` of `initialize`.
        held_back: share of r that is left empty.
    """

    adapter: str
    lr: float
    update: str
    seed: int
    longest: float | None = None
    held_back: float = 0.0

    def seed_of(self, name: str) -> int:
        """A layer's own seed, which does not depend on the other layers or their order."""
        # crc32 and not `hash`, which is salted differently in every process.
        return self.seed + zlib.crc32(name.encode())


@torch.no_grad()
def factor(name: str, gradient: Gradient, layer: LoRASBLinear, recipe: Recipe) -> tuple[Factors, Measurements]:
    """A layer's B, R and A from its gradient (Eq. 6-8), and the energy of it that they capture."""
    started, r, seed = time.perf_counter(), layer.r[recipe.adapter], recipe.seed_of(name)
    signs = gradient.signs()
    with full_precision():
        triplets = _triplets(gradient, signs, r, recipe.update, seed)
        if recipe.update == "per-sample":
            core = signed_core(signs, triplets)
            start = start_share(float(core[:r, :r].norm()), r, recipe.longest)
            factors = projected_step(triplets, core, r, start * recipe.lr, layer.scaling[recipe.adapter])
            sign_energies = energies(core)
        else:
            start = start_share(float(triplets.s[:r].norm()), r, recipe.longest)
            factors = first_step(triplets, r, start * recipe.lr, layer.scaling[recipe.adapter])
            sign_energies = _sign_energies(signs, triplets, recipe.update)
        gradient_energies = _padded(gradient.curve(triplets.u, triplets.vt), len(triplets.s))
        overlap = stability(gradient.half_signs(), r, seed)
    scalars = Scalars(
        squares=gradient.squares,
        sign_squares=signs.squares,
        zeros=gradient.zeros,
        seconds=time.perf_counter() - started,
        stability=overlap,
        start=start,
    )
    return factors, Measurements(triplets.s.double().cpu(), sign_energies.double().cpu(), gradient_energies, scalars)


def _triplets(gradient: Gradient, signs: SignBits, r: int, update: str, seed: int) -> Triplets:
    """The subspaces that B and A come from."""
    if update != "per-sample":
        return leading_triplets(signs if update == "adamw" else gradient.value(), r, seed)
    if gradient.sketch is None:
        raise RuntimeError("update='per-sample' without second moments")
    return gradient.sketch.triplets()


def _sign_energies(signs: SignBits, triplets: Triplets, update: str) -> Tensor:
    """‖U_kᵀ sign(G) V_k‖² for k = 1, 2, ..., up to the number of triplets."""
    # If sign(G) itself was factored, Uᵀ sign(G) V is diag(S), and its energies need no other product.
    if update == "adamw":
        return triplets.s.square().cumsum(0)
    return energies(signed_core(signs, triplets))


def _padded(curve: Tensor, count: int) -> Tensor:
    """The first `count` values in fp64 on the CPU, padded with NaN: a cache was measured up to its own rank only."""
    padded = torch.full((count,), float("nan"), dtype=torch.float64)
    curve = curve[:count]
    padded[: len(curve)] = curve.double().cpu()
    return padded


def count_triplets(layer: LoRASBLinear, adapter: str) -> int:
    """Number of singular triplets that the SVD of a layer returns: q = r + 32, at most min(m, n)."""
    return min(layer.r[adapter] + OVERSAMPLE, layer.in_features, layer.out_features)


def stability(halves: tuple[SignBits, SignBits] | None, r: int, seed: int) -> float:
    """Overlap of the rank-r subspaces of two halves of the samples: 1 if equal, about r/n if unrelated.

    The mean of ‖U₁ᵀU₂‖²/r and ‖V₁ᵀV₂‖²/r; NaN if halves were not summed.
    """
    if halves is None:
        return float("nan")
    first, second = (truncated_svd(half, r, seed) for half in halves)
    # Squared cosines of the principal angles, averaged over column and row space.
    left = (first.u.t() @ second.u).square().sum()
    return float((left + (first.vt @ second.vt.t()).square().sum()) / (2 * r))
