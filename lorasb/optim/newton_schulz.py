"""The orthogonal factor U Vᵀ of many square matrices U Σ Vᵀ at once, by Newton-Schulz iterations."""

from __future__ import annotations

import torch
from torch import Tensor

# of x ↦ a·x + b·x³ + c·x⁵, which brings singular values from (0, 1] to about [0.7, 1.2] in five steps (Jordan et al.
# 2024, the coefficients of torch.optim.Muon)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7  # of torch.optim.Muon: a matrix of a smaller norm gives a smaller step, down to none


def orthogonalize(matrices: Tensor) -> Tensor:
    """U S Vᵀ for each U Σ Vᵀ of `matrices` [n, r, r], with S about 1; less where the norm is below 1e-7.

    In fp32: R is small, and its 16-bit products are slower than these where a processor has no 16-bit instructions.
    """
    a, b, c = COEFFICIENTS
    x = matrices.float()
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=1.0)  # squares of large entries would overflow in the norm
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
