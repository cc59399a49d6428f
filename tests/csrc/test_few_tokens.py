"""Few tokens in bf16 over a dense W that is read as it lies, on processors that multiply bf16: forward in C++."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import measuring
import pytest
import reference
import torch
from calls import check_pooled, outputs, run
from measuring import instruction_set, threads
from torch import Tensor

import lorasb
from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear

BF16 = torch.bfloat16
BY_BF16 = ("AMX", "AVX-512 with bf16")  # instruction sets that multiply it
SETS = [name for name in measuring.SETS if name in BY_BF16]
# Halves of a panel of 32, whole panels, and what is left of them; all of them within AMX's bound.
ROWS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 64, 100)
SHAPES = ((64, 96, 32), (123, 59, 17), (31, 33, 3), (576, 48, 16))  # n, m, r: whole tiles, and none
pytestmark = pytest.mark.skipif(not SETS, reason="no C++ extension, or a processor that does not multiply bf16")


@pytest.fixture(params=SETS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param), lorasb.backend("cpp"):
        assert cpp.most_tokens(64) > 0
        yield request.param


def op(x: Tensor, case: reference.Case) -> Tensor:
    """y of the extension's op, whatever would be chosen for x."""
    y: Tensor
    y, _ = torch.ops.lorasb_csrc.dense_linear(
        x, case.weight, case.a, case.core, case.b, case.bias, case.scaling, 0.0, None
    )
    return y


def make(rows: int, n: int, m: int, r: int, **options: Any) -> reference.Case:
    return reference.make_case((rows,), n, m, r, BF16, **options)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "m", "r"), SHAPES)
def test_as_near_to_fp64_as_the_plain_chain(kernel: str, rows: int, n: int, m: int, r: int, bias: bool) -> None:
    if rows > cpp.most_tokens(m * n):
        pytest.skip(f"torch computes {rows} tokens on {kernel}")
    case = make(rows, n, m, r)
    assert cpp.computes(case.x, [case.weight])
    check_pooled(rows, n, m, r, BF16, bias=bias)


def test_the_result_is_one_sum_that_is_rounded_once(kernel: str) -> None:
    """Where the base and the adapter nearly cancel, rounding each of them alone would leave little of their sum."""
    case = make(8, 64, 64, 8)
    u = (case.x.double() @ case.a.double().t()).to(BF16)
    v = (u.double() @ (case.scaling * case.core).to(BF16).double().t()).to(BF16)
    part = v.double() @ case.b.double().t()
    base = torch.linalg.lstsq(case.x.double(), -part).solution.t().to(BF16)
    want = case.x.double() @ base.double().t() + part
    case = replace(case, weight=base.contiguous(), bias=None)
    fused, apart = op(case.x, case), (case.x @ case.weight.t()) + part.to(BF16)
    assert (fused - want).norm() < 0.5 * (apart - want).norm()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bits_depend_on_neither_threads_nor_other_tokens(kernel: str, count: int) -> None:
    case = make(min(100, cpp.most_tokens(576 * 1000)), 576, 1000, 24)
    want = op(case.x, case)
    with threads(count):
        assert torch.equal(op(case.x, case), want)
        for tokens in (1, 3, len(case.x) - 1):
            assert torch.equal(op(case.x[:tokens], case), want[:tokens])


def test_a_group_and_rows_have_the_same_bits_as_layers_and_adapters_alone(kernel: str) -> None:
    cases = [make(6, 64, m, 8, seed=m) for m in (64, 32, 32)]
    x = cases[0].x
    with torch.no_grad():
        for mine, case in zip(outputs(cases, x, [case.core for case in cases]), cases, strict=True):
            assert torch.equal(mine, outputs([case], x, [case.core])[0])
        case, cores = cases[0], torch.stack([cases[0].core.to(BF16), -2 * cases[0].core.to(BF16)])
        rows = lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, 1.0, index=[0, 1, 0, -1, 1, 1])
        for i, k in enumerate([0, 1, 0, -1, 1, 1]):
            core = cores[k] if k >= 0 else torch.zeros_like(cores[0])
            one = lora_sb_linear(x[i : i + 1], case.weight, case.a, core.float(), case.b, case.bias, 1.0)
            assert torch.allclose(rows[i : i + 1].double(), one.double(), rtol=2**-7, atol=2**-7)


def test_what_is_left_to_torch(kernel: str) -> None:
    most, weight = cpp.most_tokens(32 * 64), torch.zeros(32, 64, dtype=BF16)
    x = torch.zeros(most, 64, dtype=BF16)
    assert cpp.computes(x, [weight])
    assert cpp.computes(x.view(1, most, 64), [weight, weight])
    assert not cpp.computes(torch.zeros(most + 1, 64, dtype=BF16), [weight])
    assert not cpp.computes(x[:0], [weight])
    assert not cpp.computes(x, [weight, torch.zeros(64, 32, dtype=BF16).t()])
    assert not cpp.computes(x, [])
    if kernel != "AMX":  # without tiles, the BLAS is faster from a number of products on
        assert [cpp.most_tokens(elements) for elements in (2**19, 2**21, 2**30)] == [128, 47, 16]
        assert not cpp.computes(x, [weight, weight.expand(2**16, 32, 64).reshape(-1, 64)])
    assert not cpp.computes(x.float(), [weight.float()])


def test_a_weight_that_is_stored_transposed_goes_to_torch(kernel: str) -> None:
    case = make(6, 64, 40, 8)
    stored = case.weight.t().contiguous().t()
    turned = replace(case, weight=stored)
    for mine, theirs in zip(run(turned), reference.plain_chain(turned), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=2**-6, atol=2**-5)
