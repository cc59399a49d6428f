"""Compute one layer's factors from its gradient, and the energy that they capture."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.process_group import full_tensor
from ..layers.adapted_layer import AdaptedLayer
from ..layers.adapter_state import AdapterState
from ..layers.base import weight_present
from ..utils.precision import factorable
from .accumulator import LayerSum
from .cache import CachedGradient
from .init_report import LayerReport
from .svd import Triplets, energies, full_precision, leading_triplets, signed_core, truncated_svd
from .task import InitOptions

XS_NOISE = 1e-5  # LoRA-XS draws R from N(0, (1e-5)²)


class Factors(NamedTuple):
    """B [out, r], R [r, r], A [r, in] in fp32, and the singular values [r] of the matrix that was factored."""

    b: Tensor
    core: Tensor
    a: Tensor
    sigma: Tensor


def first_step(triplets: Triplets, r: int, lr: float, scaling: float) -> Factors:
    """Return the first step (Eq. 6-8) from U [out, q], S [q] and Vᵀ [q, in], SVD of sign(G) (AdamW) or G (SGD, Thm. 6).

    ΔW = −η·sign(G), or −η·G, = U Σ Vᵀ: B = U_r, A = V_rᵀ, R = Σ_r / s, so s·B R A is the best rank-r approximation of
    ΔW.
    """
    u, s, vt = triplets.first(r)
    # The minus sign of descent goes into B, so that R has a positive diagonal.
    return Factors(-u, torch.diag(s * (lr / scaling)), vt, s)


def start_share(norm: float, r: int, longest: float | None) -> float:
    """Return the factor on the first step's η: min(1, longest·r / norm)."""
    # An AdamW step at rate η moves each of R's r² entries by about η, so R by η·r in Frobenius norm. The first step
    # moves R by η·norm (at s = 1), where norm is ‖Σ_r‖ or the norm of the projected step.
    return 1.0 if longest is None or norm == 0.0 else min(1.0, longest * r / norm)


def lora_xs(weight: Tensor, r: int, seed: int, sigma_on: str = "input") -> Factors:
    """Return LoRA-XS's factors: A and B from the SVD U Σ Vᵀ of W [out, in], R ~ N(0, (1e-5)²).

    With Σ on the "input", A = Σ_r V_rᵀ and B = U_r, as in the authors' code (which factors Wᵀ and puts U Σ into
    `lora_A`); on the "output", A = V_rᵀ and B = U_r Σ_r. The side matters to AdamW: R's steps are longer in W's leading
    input or output directions.
    """
    u, s, vt = truncated_svd(weight, r, seed)
    # Drawn on the CPU, so that a seed gives the same numbers on any device.
    core = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype, device="cpu") * XS_NOISE
    b, a = (u, s[:, None] * vt) if sigma_on == "input" else (u * s, vt)
    return Factors(b, core.to(weight.device), a, s)


def random_subspace(shape: tuple[int, int], r: int, seed: int) -> Factors:
    """Random control: orthonormal B [out, r] and A [r, in], independent of W and of the data, and R = 0."""
    # Uniform over the subspaces: Q of the QR of a Gaussian matrix, drawn on the CPU.
    generator = torch.Generator().manual_seed(seed)
    b, a = (
        torch.linalg.qr(torch.randn(side, r, generator=generator, dtype=torch.float32, device="cpu")).Q
        for side in shape
    )
    return Factors(b, b.new_zeros(r, r), a.t().contiguous(), b.new_zeros(r))


def kaiming(weight: Tensor, r: int, scaling: float, seed: int) -> Factors:
    """Truncated SVD of a Kaiming-uniform random matrix of W's shape (Table 5)."""
    noise = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    nn.init.kaiming_uniform_(noise, generator=torch.Generator().manual_seed(seed))
    u, s, vt = truncated_svd(noise.to(weight.device), r, seed)
    return Factors(u, torch.diag(s / scaling), vt, s)


@torch.no_grad()
def factor_weight(name: str, layer: AdaptedLayer, init: str, options: InitOptions) -> tuple[Factors, LayerReport]:
    """Return a layer's factors for a data-free init or "weight", from its W [out, in] or random; and its report."""
    started, state, seed = time.perf_counter(), layer.adapters[options.adapter], options.seed_of(name)
    shape, r = (layer.out_features, layer.in_features), state.r
    if init == "random":
        factors = random_subspace(shape, r, seed)
    else:
        # accelerate keeps offloaded weights on the meta device outside of their layer's forward, and FSDP2 shards them
        with weight_present(layer.get_base_layer()), full_precision():
            weight = factorable(full_tensor(layer.base.weight())).float()
            if not torch.isfinite(weight).all():
                raise ValueError(f"weight of layer {name!r} has NaN or Inf entries: reload it, or use exclude_modules")
            if init == "kaiming":
                factors = kaiming(weight, r, state.scaling, seed)
            elif init == "weight":  # W's leading subspace, and R = 0
                u, s, vt = truncated_svd(weight, r, seed)
                factors = Factors(u, u.new_zeros(r, r), vt, s)
            else:
                factors = lora_xs(weight, r, seed, "output" if init == "lora-xs-output" else "input")
    sigma, seconds = tuple(map(float, factors.sigma)), time.perf_counter() - started
    return factors, LayerReport(name, shape, r, None, None, sigma, 0, seconds)


Gradient = LayerSum | CachedGradient  # G of a layer: all its values, or only their signs


@torch.no_grad()
def factor(
    name: str, gradient: Gradient, layer: AdaptedLayer, options: InitOptions
) -> tuple[Factors, LayerReport, list[float]]:
    """Return a layer's B, R and A from its gradient (Eq. 6-8), its report, and ‖U_kᵀ ΣG V_k‖² for k = 1, 2, ..."""
    started, state = time.perf_counter(), layer.adapters[options.adapter]
    with full_precision():
        factors, triplets, of_sign, start = _factored(gradient, state, options, options.seed_of(name))
        of_gradient = gradient.curve(triplets.u, triplets.vt)[: len(triplets.s)].tolist()
    signs, r, shape = gradient.signs(), state.r, (layer.out_features, layer.in_features)
    sigma, nonzero = _rounded(triplets.s.tolist()), shape[0] * shape[1] - signs.zeros
    curve_sign = _rounded(value / max(nonzero, 1) for value in of_sign.tolist())
    curve_grad = _rounded(value / signs.squares for value in of_gradient)
    report = LayerReport(
        name=name,
        shape=shape,
        rank=r,
        energy_sign=curve_sign[r - 1],
        # a cache made at a smaller rank has no energy at this one
        energy_grad=curve_grad[r - 1] if len(curve_grad) >= r else None,
        singular_values=sigma[:r],
        zeros=signs.zeros,
        seconds=time.perf_counter() - started,
        beyond=sigma[r:],
        curve_sign=curve_sign,
        curve_grad=curve_grad,
        start=_rounded([start])[0],
    )
    return factors, report, of_gradient


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Round to eight significant digits (more than fp32 has), to keep the JSON short."""
    return tuple(float(f"{value:.8g}") for value in values)


def _factored(
    gradient: Gradient, state: AdapterState, options: InitOptions, seed: int
) -> tuple[Factors, Triplets, Tensor, float]:
    """Return factors, their triplets, ‖U_kᵀ sign(ΣG) V_k‖² for k = 1 ... q, and the factor on η (`start_share`)."""
    r, longest, bits = state.r, options.longest_start, gradient.signs().bits
    if isinstance(gradient, LayerSum) and gradient.sketch is not None:
        # AdamW's first step, projected onto U and V: R = −η·core / s, with core = Uᵀ sign(G) V [q, q].
        triplets = gradient.sketch.triplets()
        core = signed_core(bits, triplets)
        start = start_share(float(core[:r, :r].norm()), r, longest)
        u, s, vt = triplets.first(r)
        return Factors(u, core[:r, :r] * (-start * options.eta / state.scaling), vt, s), triplets, energies(core), start
    matrix = gradient.value() if options.update == "sgd" and isinstance(gradient, LayerSum) else bits
    triplets = leading_triplets(matrix, r, seed)
    start = start_share(float(triplets.s[:r].norm()), r, longest)
    # If sign(G) itself was factored, Uᵀ sign(G) V is diag(S), and its energies need no further product.
    of_sign = triplets.s.square().cumsum(0) if matrix is bits else energies(signed_core(bits, triplets))
    return first_step(triplets, r, start * options.eta, state.scaling), triplets, of_sign, start


def overlap(first: Triplets, second: Triplets) -> float:
    """Overlap of two subspaces of rank r: the mean of ‖U₁ᵀU₂‖²/r and ‖V₁ᵀV₂‖²/r; 1 if equal, r/n if unrelated."""
    # Squared cosines of the principal angles, averaged over column and row space.
    left = (first.u.t() @ second.u).square().sum()
    return float((left + (first.vt @ second.vt.t()).square().sum()) / (2 * len(first.s)))
