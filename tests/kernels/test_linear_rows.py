"""Rows with an R of their own through the fused kernels, under Triton's interpreter or as compiled code."""

from __future__ import annotations

import environment  # noqa: F401  before triton is imported
import pytest
import reference
import tolerances
import torch
from storages import storage

import lorasb
from lorasb.functional import lora_sb_linear
from lorasb.kernels.launcher import observed

INDEX = [1, 0, -1, 1, 2]


def results(case: reference.Case, cores: torch.Tensor, backend: str, weight: object = None) -> tuple[torch.Tensor, ...]:
    x, cores = case.x.clone().requires_grad_(True), cores.clone().requires_grad_(True)
    with lorasb.backend(backend):
        given = case.weight if weight is None else weight
        y = lora_sb_linear(x, given, case.a, cores, case.b, case.bias, case.scaling, index=INDEX)
        dx, dcores = torch.autograd.grad(y, (x, cores), case.dy)
    return y.detach(), dx, dcores


def make(tokens: int, n: int, m: int, r: int) -> tuple[reference.Case, torch.Tensor]:
    case = reference.make_case((len(INDEX), tokens), n, m, r, torch.float32)
    g = torch.Generator().manual_seed(0)
    return case, torch.stack([case.core * torch.randn(r, r, generator=g) for _ in range(3)])


@pytest.mark.parametrize(("tokens", "n", "m", "r"), [(1, 64, 48, 16), (13, 123, 59, 5), (20, 112, 128, 96)])
def test_rows_are_eagers_with_the_extended_gemm_as_it_is(tokens: int, n: int, m: int, r: int) -> None:
    case, cores = make(tokens, n, m, r)
    with observed() as launches:
        found = results(case, cores, "triton")
    assert [one.name for one in launches] == ["prep_forward", "extended_gemm", "prep_backward", "extended_gemm"]
    for result, want in zip(found, results(case.double(), cores.double(), "eager"), strict=True):
        tolerances.check(result, want, tolerances.fp32(n + m + r))


def test_a_quantized_base() -> None:
    case, cores = make(3, 128, 64, 8)
    weight = storage(64, 128, dtype=torch.float32)
    for result, want in zip(results(case, cores, "triton", weight), results(case, cores, "eager", weight), strict=True):
        tolerances.check(result, want, tolerances.fp32(128 + 64))


def test_an_index_out_of_range_is_an_error_before_a_launch() -> None:
    case, cores = make(2, 64, 48, 16)
    with (
        observed() as launches,
        lorasb.backend("triton"),
        pytest.raises(IndexError, match=r"expected index in \[-1, 2\), .* got 2"),
    ):
        lora_sb_linear(case.x, case.weight, case.a, cores[:2], case.b, index=INDEX)
    assert not launches
