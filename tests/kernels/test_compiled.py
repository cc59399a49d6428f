"""Compiled kernels, executed: what `make test` runs of `pytest --ptx ARCH` (sm_86, sm_90), small and of every kind."""

from __future__ import annotations

from dataclasses import replace

import environment
import pytest
import reference
import tolerances
import torch
from calls import dense, exact, run_kernels
from kernel_cases import INDEX, check_follows_mask, checked, planned, row_cases
from ptx.plugin import Executor
from reference import make_case
from storages import bits_of, storage
from storages import exact as dequantized

import lorasb
from lorasb.functional import dequantize
from lorasb.kernels import linear as launch
from lorasb.kernels import plan
from lorasb.kernels.launcher import observed
from lorasb.ops.plain_ops import unpack_words
from lorasb.ops.registry import backend_op

pytestmark = pytest.mark.skipif(not environment.PTX, reason="executes compiled kernels: pytest --ptx sm_86")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
SHAPES = {
    "decode": (3, 128, 80, 16),
    "aligned": (64, 128, 128, 64),
    "ragged, two blocks of rows": (70, 100, 130, 24),
    "long reduction": (20, 1024, 64, 16),
    "ranks read in blocks": (20, 160, 144, 144),
}


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: str, dtype: torch.dtype) -> None:
    M, n, m, r = SHAPES[shape]
    case = make_case((M,), n, m, r, dtype)
    launches = checked(case)
    assert [one.name for one in launches] == ["prep_forward", "extended_gemm", "prep_backward", "extended_gemm"]
    if shape == "long reduction":
        assert max(one.arguments["splits"] for one in launches) > 1


@pytest.mark.parametrize(
    ("tokens", "n", "ms", "r"),
    [(1, 160, (144,), 16), (19, 160, (144,), 40), (3, 160, (144,), 144), (3, 96, (80, 48), 24)],
)
def test_rows_with_an_r_each(tokens: int, n: int, ms: tuple[int, ...], r: int) -> None:
    cases = row_cases(tokens, n, ms, r, torch.bfloat16)
    tolerances.check_scaled(run_kernels(*cases, index=INDEX), exact(*cases, index=INDEX), tolerances.BF16_FEW)


def test_the_order_of_programs_does_not_matter(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split sums, in as many orders as there are programs: each in turn comes last. The executor compares the bits."""
    monkeypatch.setattr(executor, "every_last", True)
    case = make_case((5,), 512, 48, 16, torch.bfloat16)
    launches = checked(case)
    assert max(one.arguments["splits"] for one in launches) > 1
    assert all(not one.arguments["counters"].any() for one in launches if one.arguments["splits"] > 1)


def test_dropout_follows_its_mask() -> None:
    check_follows_mask(make_case((24,), 64, 48, 8, torch.bfloat16, bias=False), 0.4, tolerances.HALF_FEW)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "way"), [(5, "inline"), (40, "scratch")])
def test_4_bits_inline_and_by_a_scratch(rows: int, way: str, nested: bool) -> None:
    """A GEMM that dequantizes as it goes, or a scratch that is filled beside the thin products."""
    case = replace(make_case((rows,), 64, 48, 16, torch.bfloat16), weight=storage(48, 64, "nf4", 64, nested))
    with planned(weights=way), observed() as launches:
        found = run_kernels(case)
    assert ("quantized_gemm" in {one.name for one in launches}) == (way == "inline")
    tolerances.check_scaled(found, reference.by_formulas(dense(case).double()), tolerances.HALF_FEW)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantization_is_exact(kind: str) -> None:
    weight = storage(33, 62, kind, 32, True, torch.float32)
    with lorasb.backend("triton"):
        assert torch.equal(bits_of(dequantize(weight, torch.bfloat16)), bits_of(dequantized(weight, torch.bfloat16)))


def test_gradient_signs() -> None:
    g = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(70, features, generator=g).bfloat16() for features in (65, 130))
    total = torch.randn(65, 130, generator=g)
    before = total.double()
    words, nonzero, _ = backend_op("gradient_signs", "triton")(dy, x, total, False)
    want = before + dy.double().t() @ x.double()
    tolerances.check(total, want, tolerances.fp32(71))
    found = unpack_words(words, 130, -1.0, 1.0, torch.float32) * unpack_words(nonzero, 130, 0.0, 1.0, torch.float32)
    assert torch.equal(found, torch.sign(total))


def test_the_core_is_not_cut_to_tf32() -> None:
    """v = u Rᵀ of a 16-bit x is as near to fp64 as an fp32 product's: R goes through the tensor cores in two parts."""
    M, r = 64, 64
    case = make_case((M,), 64, 64, r, torch.float16, bias=False)
    eye = torch.eye(64, dtype=torch.float16)
    members = launch.Members([None], [eye], [case.core], [eye], [None], [1.0])
    chosen = plan.choose(plan.Shape("forward", "fp16", M, 64, 64, r), environment.PTX, 1)
    (y,), (u,) = launch.forward(case.x, members, chosen, launch.Mask())
    assert torch.equal(u, case.x)
    want = case.x.double() @ case.core.double().t()
    plain = (case.x.float() @ case.core.t()).half()
    tolerances.check_half(y, plain, want)
    bias = float((y.double() * want).sum() / want.square().sum()) - 1.0
    assert abs(bias) < abs(float((plain.double() * want).sum() / want.square().sum()) - 1.0) + 2e-5
