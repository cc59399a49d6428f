"""From one layer's gradient to its factors, and the energy that they capture."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.adapted_layer import AdaptedLayer
from .accumulator import LayerSum
from .cache import CachedGradient
from .init_report import LayerReport
from .svd import Triplets, energies, full_precision, leading_triplets, signed_core, truncated_svd
from .task import InitOptions


class Measurements(NamedTuple):
    """Measurements of one layer at the q leading singular triplets of the matrix that was factored."""

    sigma: list[float]  # singular values [q]
    sign_energies: list[float]  # ‖U_kᵀ sign(ΣG) V_k‖² for k = 1 ... q
    gradient_energies: list[float]  # ‖U_kᵀ ΣG V_k‖² for k = 1 ... q, or up to the rank that a cache was measured at
    squares: float  # ‖ΣG‖²
    sign_squares: float  # ‖sign(ΣG)‖², the number of its nonzero entries
    zeros: int  # number of entries of ΣG that are exactly zero
    seconds: float  # duration of the SVD and the measurements
    start: float  # factor on η of the first step (`longest_start`)

    def report(self, name: str, layer: AdaptedLayer, adapter: str) -> LayerReport:
        """The layer's report, with energies as fractions of the squared Frobenius norms."""
        r = layer.adapters[adapter].r
        sigma = tuple(map(_rounded, self.sigma))
        curve_sign = tuple(_rounded(value / max(self.sign_squares, 1.0)) for value in self.sign_energies)
        curve_grad = tuple(_rounded(value / self.squares) for value in self.gradient_energies)
        return LayerReport(
            name=name,
            shape=(layer.out_features, layer.in_features),
            rank=r,
            energy_sign=curve_sign[r - 1],
            # a cache made at a smaller rank has no energy at this one
            energy_grad=curve_grad[r - 1] if len(curve_grad) >= r else None,
            singular_values=sigma[:r],
            zeros=self.zeros,
            seconds=self.seconds,
            beyond=sigma[r:],
            curve_sign=curve_sign,
            curve_grad=curve_grad,
            start=_rounded(self.start),
        )


def _rounded(value: float) -> float:
    """Eight significant digits, to keep the JSON short: fp32 has fewer."""
    return float(f"{value:.8g}")


XS_NOISE = 1e-5  # LoRA-XS draws R from N(0, (1e-5)²)


class Factors(NamedTuple):
    """B [out, r], R [r, r], A [r, in] in fp32, and the singular values [r] of the matrix they come from."""

    b: Tensor
    core: Tensor
    a: Tensor
    sigma: Tensor


def first_step(triplets: Triplets, r: int, lr: float, scaling: float) -> Factors:
    """From the SVD U [out, q], S [q], Vᵀ [q, in] of sign(G) (AdamW) or G (SGD, Theorem 6) to the first step (Eq. 6-8).

    ΔW = −η·sign(G), or −η·G, = U Σ Vᵀ: B = U_r, A = V_rᵀ, R = Σ_r / s, so s·B R A is the best rank-r approximation of
    ΔW.
    """
    u, s, vt = triplets.first(r)
    # The minus of the descent goes into B, so that R keeps a positive diagonal.
    return Factors(-u, torch.diag(s * (lr / scaling)), vt, s)


def start_share(norm: float, r: int, longest: float | None) -> float:
    """The factor on η of the first step: min(1, longest·r / norm)."""
    # A step of AdamW at the rate η moves each of R's r² entries by about η, R by η·r in Frobenius norm; the first step
    # moves it by η·norm (at s = 1), ‖Σ_r‖ or that of the projected step.
    return 1.0 if longest is None or norm == 0.0 else min(1.0, longest * r / norm)


def subspace_of_weight(weight: Tensor, r: int, seed: int) -> Factors:
    """Orthonormal B = U_r, A = V_rᵀ of W and R = 0: for a layer that no sample reached, whose first step is zero."""
    u, s, vt = truncated_svd(weight, r, seed)
    return Factors(u, torch.zeros(r, r, dtype=u.dtype, device=u.device), vt, s)


def lora_xs(weight: Tensor, r: int, seed: int, sigma_on: str = "input") -> Factors:
    """LoRA-XS's recipe: from the SVD U Σ Vᵀ of W [out, in], R ~ N(0, (1e-5)²).

    With Σ on the "input", A = Σ_r V_rᵀ and B = U_r, as the authors' code has it (it factors Wᵀ, and gives U Σ to
    `lora_A`), or on the "output", A = V_rᵀ and B = U_r Σ_r. AdamW is not invariant to the side: R's steps are longer in
    W's leading directions, of the input or the output.
    """
    u, s, vt = truncated_svd(weight, r, seed)
    # Drawn on the CPU, where a seed gives the same numbers whatever device the layer is on.
    core = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype) * XS_NOISE
    b, a = (u, s[:, None] * vt) if sigma_on == "input" else (u * s, vt)
    return Factors(b, core.to(weight.device), a, s)


def random_subspace(shape: tuple[int, int], r: int, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Orthonormal B [out, r] and A [r, in] that know nothing of W or of the data, and R = 0: what chance gives."""
    # Uniform over the subspaces: Q of the QR of a Gaussian matrix, drawn on the CPU.
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.linalg.qr(torch.randn(side, r, generator=generator, dtype=dtype)).Q for side in shape)
    return Factors(b, torch.zeros(r, r, dtype=dtype), a.t().contiguous(), torch.zeros(r, dtype=dtype))


def kaiming(weight: Tensor, r: int, scaling: float, seed: int) -> Factors:
    """Truncated SVD of a Kaiming-uniform random matrix of W's shape (Table 5)."""
    bound = math.sqrt(6.0 / weight.shape[1])  # as nn.init.kaiming_uniform_ with a=0 and fan_in
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
    u, s, vt = truncated_svd(((2.0 * noise - 1.0) * bound).to(weight.device), r, seed)
    return Factors(u, torch.diag(s / scaling), vt, s)


Gradient = LayerSum | CachedGradient  # G of a layer, with all its values or its signs only


@torch.no_grad()
def factor(name: str, gradient: Gradient, layer: AdaptedLayer, options: InitOptions) -> tuple[Factors, Measurements]:
    """A layer's B, R and A from its gradient (Eq. 6-8), and the energy of it that they capture."""
    started, state, seed = time.perf_counter(), layer.adapters[options.adapter], options.seed_of(name)
    # Theorem 6: the first step of SGD has no limit.
    r, longest = state.r, None if options.update == "sgd" else options.longest_start
    signs, bits = gradient.signs(), gradient.signs().bits
    with full_precision():
        if isinstance(gradient, LayerSum) and gradient.sketch is not None:
            # The part of AdamW's first step within U and V: R = −η·core / s, with the core Uᵀ sign(G) V [q, q].
            triplets = gradient.sketch.triplets()
            core = signed_core(bits, triplets)
            start = start_share(float(core[:r, :r].norm()), r, longest)
            u, s, vt = triplets.first(r)
            factors = Factors(u, core[:r, :r] * (-start * options.lr / state.scaling), vt, s)
            sign_energies = energies(core)
        else:
            matrix = gradient.value() if options.update == "sgd" and isinstance(gradient, LayerSum) else bits
            triplets = leading_triplets(matrix, r, seed)
            start = start_share(float(triplets.s[:r].norm()), r, longest)
            factors = first_step(triplets, r, start * options.lr, state.scaling)
            # If sign(G) itself was factored, Uᵀ sign(G) V is diag(S), and its energies need no other product.
            sign_energies = triplets.s.square().cumsum(0) if matrix is bits else energies(signed_core(bits, triplets))
        curve = gradient.curve(triplets.u, triplets.vt)[: len(triplets.s)]
    sigma, of_sign, of_gradient = (values.double().tolist() for values in (triplets.s, sign_energies, curve))
    scalars = signs.squares, bits.squares, signs.zeros, time.perf_counter() - started, start
    return factors, Measurements(sigma, of_sign, of_gradient, *scalars)


def overlap(first: Triplets, second: Triplets) -> float:
    """Overlap of two subspaces of rank r: the mean of ‖U₁ᵀU₂‖²/r and ‖V₁ᵀV₂‖²/r; 1 if equal, r/n if unrelated."""
    # Squared cosines of the principal angles, averaged over column and row space.
    left = (first.u.t() @ second.u).square().sum()
    return float((left + (first.vt @ second.vt.t()).square().sum()) / (2 * len(first.s)))
