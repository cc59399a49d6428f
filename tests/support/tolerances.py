"""The only table of tolerances. Tests name its rows; they never write a bound next to an assertion."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= atol + rtol·|expected|, and why."""

    rtol: float
    atol: float
    why: str


GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}  # central differences in fp64
HALF_ERROR = 1.1  # a 16-bit result may be this much further from fp64 than the plain chain in the same dtype
POOL = 400  # elements that a comparison of rounding noise needs: its own noise is then 1/sqrt(2·400) = 3.5%
HALF_FLOOR = 1e-5  # for results which the plain chain happens to get exactly
HALF_FEW = Tolerance(2e-2, 2e-2, "too few 16-bit results to compare noise: 2^-11 per element, times cancellation")
BF16_FEW = Tolerance(1.6e-1, 1.6e-1, "the same in bf16: 2^-8 per element")
FP64 = Tolerance(1e-10, 1e-10, "fp64 sums in another order")
FP32_NORMS = Tolerance(0.0, 1e-7, "fp64 sums through transformers' norms, which round to fp32 (2^-24)")
FP32_LOGITS = Tolerance(1e-4, 1e-5, "gradients through logits converted to fp32 for the loss, over their largest entry")
MERGE = Tolerance(0.0, 1e-5, "one rounding of fp32 weights of size one, summed over a forward")
EXPORT = Tolerance(0.0, 1e-5, "A and s·B·R instead of A, R and B: another order of the same fp32 products")
SECOND_DEVICE = Tolerance(2e-2, 0.0, "sums in another order, of a norm; a gradient near zero may change its sign")
ENGINE = Tolerance(0.0, 1e-3, "log-probabilities from fp32 sums of another engine, through thirty blocks")
EXACT = Tolerance(0.0, 0.0, "the same operations on the same bits")
FACTORS = Tolerance(1e-4, 1e-5, "fp32 products of factors, over the largest singular value")
THEORY = Tolerance(1e-8, 1e-10, "an identity between fp64 products")
BATCHING = Tolerance(2e-4, 2e-6, "fp32 gradients over their largest entry, summed in another order and padded")
STEPS = Tolerance(2e-4, 2e-5, "fp32 gradients and a few SGD steps over their largest entry, in another order")
ORTHONORMAL = Tolerance(0.0, 1e-5, "columns after fp32 QR and SVD")
ROUNDED_FACTORS = Tolerance(0.0, 2**-7, "orthonormal rows rounded to bf16, 2^-9 per entry")
ENERGY = 0.999  # captured energy over the optimum's
PROCESS_SUMS = Tolerance(1e-3, 2e-5, "a model of two blocks whose fp32 sums were taken in another order")
SAME_STEP = 0.99  # cosine of two steps -sign(G), cut to r = 4, whose sums were taken in another order
FOUR_BITS = 0.15  # relative error of a weight rounded to 4 bits in groups of 32
SIGN_MISMATCH = 1e-4  # share of signs that rounding may flip when a sum is taken in another order
RANKS = Tolerance(0.0, 1e-6, "energies of the same sums, taken in another order and by another number of threads")


def fp32(contraction: int) -> Tolerance:
    """Sums of `contraction` fp32 products: errors grow with the square root of their number."""
    return Tolerance(1.3e-6, 5e-6 * math.sqrt(contraction), f"{contraction} fp32 products summed")


Tensors = torch.Tensor | Sequence[torch.Tensor]


def _pairs(actual: Tensors, expected: Tensors) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return [(actual, expected)] if isinstance(actual, torch.Tensor) else zip(actual, expected, strict=True)


def check(actual: Tensors, expected: Tensors, tolerance: Tolerance) -> None:
    """Assert that two tensors, or the pairs from two sequences, agree within a tolerance, compared in fp64."""
    bounds = {"rtol": tolerance.rtol, "atol": tolerance.atol, "msg": lambda m: f"{tolerance.why}: {m}"}
    for one, other in _pairs(actual, expected):
        torch.testing.assert_close(one.double(), other.double(), **bounds)


def check_scaled(actual: Tensors, expected: Tensors, tolerance: Tolerance, least: float = 0.0) -> None:
    """Assert a tolerance relative to the largest expected value, or to `least` if that is larger."""
    for one, other in _pairs(actual, expected):
        scale = max(float(other.abs().max()), least) if other.numel() else 1.0
        check(one.double() / scale, other.double() / scale, tolerance)


def check_equal(actual: Tensors | dict[str, torch.Tensor], expected: Tensors | dict[str, torch.Tensor]) -> None:
    """Assert the same values and dtypes."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check_half(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that a 16-bit result is as near to fp64 as the plain chain in the same dtype.

    This compares rounding noise, which takes many elements: small results are pooled over seeds.
    """
    assert actual.numel() >= POOL, f"{actual.numel()} elements are too few to compare: pool at least {POOL}"
    ours, theirs = error(actual, exact), error(plain, exact)
    assert ours <= HALF_ERROR * theirs + HALF_FLOOR, f"error {ours:.3e} against {theirs:.3e} of the plain chain"
