"""From a matrix to B, R and A: LoRA-SB's first step, and baselines without data: LoRA-XS, Kaiming, random."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.svd import Triplets, truncated_svd

XS_NOISE = 1e-5  # LoRA-XS draws R from N(0, (1e-5)²)


class Factors(NamedTuple):
    """B [out, r], R [r, r], A [r, in] in fp32, and the singular values [r] of the matrix they come from."""

    b: Tensor
    core: Tensor
    a: Tensor
    sigma: Tensor


def first_step(triplets: Triplets, r: int, lr: float, scaling: float) -> Factors:
    """From the SVD of sign(G) (AdamW) or G (SGD, Theorem 6) to the first step of full fine-tuning (Eq. 6-8).

    ΔW = −η·sign(G), or −η·G, = U Σ Vᵀ: B = U_r, A = V_rᵀ, R = Σ_r / s, so s·B R A is the best rank-r approximation of
    ΔW.

    Args:
        triplets: U [out, q], S [q] and Vᵀ [q, in] of sign(G) or G.
        r: rank.
        lr: η.
        scaling: s.
    """
    u, s, vt = triplets.first(r)
    # The minus of the descent goes into B, so that R keeps a positive diagonal.
    return Factors(-u, torch.diag(s * (lr / scaling)), vt, s)


def projected_step(triplets: Triplets, core: Tensor, r: int, lr: float, scaling: float) -> Factors:
    """The part of AdamW's first step that lies in subspaces which come from elsewhere: R = −η·Uᵀ sign(G) V / s.

    Args:
        triplets: orthonormal U [out, q] and Vᵀ [q, in], and the values [q] that they are ordered by.
        core: Uᵀ sign(G) V [q, q].
        r: rank.
        lr: η.
        scaling: s.
    """
    u, s, vt = triplets.first(r)
    return Factors(u, core[:r, :r] * (-lr / scaling), vt, s)


def start_share(norm: float, r: int, longest: float | None) -> float:
    """The factor on η of the first step: min(1, longest·r / norm).

    A step of AdamW at the rate η moves each of R's r² entries by about η, R by η·r in Frobenius norm; the first step
    moves it by η·norm (at s = 1), ‖Σ_r‖ or that of the projected step.
    """
    return 1.0 if longest is None or norm == 0.0 else min(1.0, longest * r / norm)


def subspace_of_weight(weight: Tensor, r: int, seed: int) -> Factors:
    """Orthonormal B = U_r, A = V_rᵀ of W and R = 0: for a layer that no sample reached, whose first step is zero."""
    u, s, vt = truncated_svd(weight, r, seed)
    return Factors(u, torch.zeros(r, r, dtype=u.dtype, device=u.device), vt, s)


def lora_xs(weight: Tensor, r: int, seed: int, sigma_on: str = "input") -> Factors:
    """LoRA-XS's recipe: from the SVD U Σ Vᵀ of W, R ~ N(0, (1e-5)²).

    AdamW is not invariant to the side of Σ: R's steps are longer in W's leading directions, of the input or the output.

    Args:
        weight: W [out, in].
        r: rank.
        seed: of R, and of the SVD's random start.
        sigma_on: "input", A = Σ_r V_rᵀ and B = U_r, as the authors' code has it (it factors Wᵀ, and gives U Σ to
            `lora_A`), or "output", A = V_rᵀ and B = U_r Σ_r.
    """
    u, s, vt = truncated_svd(weight, r, seed)
    # Drawn on the CPU, where a seed gives the same numbers whatever device the layer is on.
    core = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype) * XS_NOISE
    b, a = (u, s[:, None] * vt) if sigma_on == "input" else (u * s, vt)
    return Factors(b, core.to(weight.device), a, s)


def random_subspace(shape: tuple[int, int], r: int, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Orthonormal B [out, r] and A [r, in] that know nothing of W or of the data, and R = 0: what chance gives.

    Uniform over the subspaces: Q of the QR of a Gaussian matrix, drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.linalg.qr(torch.randn(side, r, generator=generator, dtype=dtype)).Q for side in shape)
    return Factors(b, torch.zeros(r, r, dtype=dtype), a.t().contiguous(), torch.zeros(r, dtype=dtype))


def kaiming(weight: Tensor, r: int, scaling: float, seed: int) -> Factors:
    """Truncated SVD of a Kaiming-uniform random matrix of W's shape (Table 5)."""
    bound = math.sqrt(6.0 / weight.shape[1])  # as nn.init.kaiming_uniform_ with a=0 and fan_in
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=weight.dtype)
    u, s, vt = truncated_svd(((2.0 * noise - 1.0) * bound).to(weight.device), r, seed)
    return Factors(u, torch.diag(s / scaling), vt, s)
