"""Compiled kernels, executed: what `make test` runs of `pytest --ptx ARCH` (sm_86 and sm_90), small and of every kind.

Without --ptx there is nothing to run: the same calls are interpreted by the tests beside this file.
"""

from __future__ import annotations

from dataclasses import replace

import environment
import pytest
import reference
import tolerances
import torch
from calls import run_kernels
from kernel_cases import check_case, check_group, group_cases, run_group
from reference import make_case
from storages import bits_of, exact, storage
from torch import Tensor

import lorasb
from lorasb.functional import dequantize, lora_sb_linear, lora_sb_linear_group
from lorasb.kernels import linear as launch
from lorasb.kernels import plan
from lorasb.kernels.launcher import observed
from lorasb.ops.registry import backend_op
from lorasb.utils.bit_packing import unpack_words

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
    with observed() as launches:
        results = run_kernels(case)
    check_case(case, results)
    assert [one.name for one in launches] == ["prep_forward", "extended_gemm", "prep_backward", "extended_gemm"]
    if shape == "long reduction":
        assert max(one.arguments["splits"] for one in launches) > 1


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_a_group(dtype: torch.dtype) -> None:
    cases = group_cases(20, 64, (48, 32, 40), 24, dtype)
    check_group(cases, run_group(cases))


@pytest.mark.parametrize(("tokens", "r"), [(1, 16), (19, 40), (3, 144)])
def test_rows_with_an_r_each(tokens: int, r: int) -> None:
    index = [1, 0, -1, 1, 2]
    case = make_case((len(index), tokens), 160, 144, r, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    cores = torch.stack([case.core * torch.randn(r, r, generator=g) for _ in range(3)])
    found = _by_row(case, cores, index, "triton")
    for got, want in zip(found, _by_row(case.double(), cores.double(), index, "eager"), strict=True):
        scale = want.abs().max()
        tolerances.check(got / scale, want / scale, tolerances.BF16_FEW)


def test_a_group_of_rows_with_an_r_each() -> None:
    index = [1, 0, -1, 1, 2]
    cases = [make_case((len(index), 3), 96, m, 24, torch.bfloat16, seed=m) for m in (80, 48)]
    for case in cases:
        case.x = cases[0].x
        case.core = torch.stack([case.core * scale for scale in (1.0, -2.0, 0.5)])
    found = _group_by_row(cases, index, "triton")
    for got, want in zip(found, _group_by_row([case.double() for case in cases], index, "eager"), strict=True):
        scale = want.abs().max()
        tolerances.check(got / scale, want / scale, tolerances.BF16_FEW)


def _group_by_row(cases: list[reference.Case], index: list[int], backend: str) -> list[Tensor]:
    x, cores = cases[0].x.clone().requires_grad_(), [case.core.clone().requires_grad_() for case in cases]
    lists = [[c.weight for c in cases], [c.a for c in cases], cores, [c.b for c in cases], [c.bias for c in cases]]
    with lorasb.backend(backend):
        ys = lora_sb_linear_group(x, *lists, [c.scaling for c in cases], index=index)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, (x, *cores), [c.dy for c in cases])]


def _by_row(case: reference.Case, cores: Tensor, index: list[int], backend: str) -> tuple[Tensor, ...]:
    x, cores = case.x.clone().requires_grad_(), cores.clone().requires_grad_()
    with lorasb.backend(backend):
        y = lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, case.scaling, index=index)
    return (y.detach(), *torch.autograd.grad(y, (x, cores), case.dy))


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split sums, in as many orders as there are programs: each in turn comes last. The executor compares the bits."""
    monkeypatch.setattr(request.config.ptx_executor, "every_last", True)  # type: ignore[attr-defined]
    case = make_case((5,), 512, 48, 16, torch.bfloat16)
    with observed() as launches:
        check_case(case, run_kernels(case))
    assert max(one.arguments["splits"] for one in launches) > 1
    assert all(not one.arguments["counters"].any() for one in launches if one.arguments["splits"] > 1)


def test_dropout_follows_its_mask() -> None:
    case = make_case((24,), 64, 48, 8, torch.bfloat16, bias=False)
    torch.manual_seed(5)
    y, dx, dcore = run_kernels(case, dropout=0.4)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, (1,), dtype=torch.int64))  # as the call drew it
    mask = _mask(case, seed, 0.4).double() / 0.6
    wide = case.double()
    u, t = (wide.x * mask) @ wide.a.t(), wide.dy @ wide.b
    adapted = wide.scaling * u @ wide.core.t() @ wide.b.t()
    tolerances.check(y, wide.x @ wide.weight.t() + adapted, tolerances.HALF_FEW)
    want_dx = wide.dy @ wide.weight + mask * (wide.scaling * t @ wide.core @ wide.a)
    tolerances.check(dx, want_dx, tolerances.HALF_FEW)
    want = wide.scaling * t.t() @ u
    tolerances.check(dcore / want.abs().max(), want / want.abs().max(), tolerances.HALF_FEW)


def _mask(case: reference.Case, seed: int, dropout: float) -> Tensor:
    """What the kernels keep of x, seen through A = all unit vectors."""
    M, n = case.x.shape
    eye = torch.eye(n, dtype=case.x.dtype)
    members = launch.Members([None], [eye], [eye.float()], [eye], [1.0])
    chosen = plan.choose(plan.Shape("forward", "bf16", M, n, n, n), environment.PTX, 1)
    _, (u,) = launch.forward(torch.ones_like(case.x), members, [None], chosen, launch.Mask(dropout, (seed,)))
    return u == 1.0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "way"), [(5, "inline"), (40, "scratch")])
def test_4_bits_inline_and_by_a_scratch(rows: int, way: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GEMM that dequantizes as it goes, or a scratch that is filled beside the thin products."""
    chosen = plan.choose
    monkeypatch.setattr(plan, "choose", lambda *a: replace(chosen(*a), weights=way))
    plan.forget()
    dtype = torch.bfloat16
    weight = storage(48, 64, "nf4", 64, nested, dtype)
    case = make_case((rows,), 64, 48, 16, dtype)
    x, core = case.x.clone().requires_grad_(), case.core.clone().requires_grad_()
    with observed() as launches, lorasb.backend("triton"):
        y = lora_sb_linear(x, weight, case.a, core, case.b, case.bias, case.scaling)
        y.backward(case.dy)
    plan.forget()
    assert ("quantized_gemm" in {one.name for one in launches}) == (way == "inline")
    dense = exact(weight, torch.float64)
    wide = case.double()
    wide.weight = dense
    dx, dcore = reference.gradients(wide)
    for got, want in zip((y.detach(), x.grad, core.grad), (reference.forward(wide), dx, dcore), strict=True):
        scale = want.abs().max()
        tolerances.check(got / scale, want / scale, tolerances.HALF_FEW)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantization_is_exact(kind: str) -> None:
    weight = storage(33, 62, kind, 32, True, torch.float32)
    with lorasb.backend("triton"):
        assert torch.equal(bits_of(dequantize(weight, torch.bfloat16)), bits_of(exact(weight, torch.bfloat16)))


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
    members = launch.Members([None], [eye], [case.core], [eye], [1.0])
    chosen = plan.choose(plan.Shape("forward", "fp16", M, 64, 64, r), environment.PTX, 1)
    (y,), (u,) = launch.forward(case.x, members, [None], chosen, launch.Mask())
    assert torch.equal(u, case.x)
    want = case.x.double() @ case.core.double().t()
    plain = (case.x.float() @ case.core.t()).half()
    tolerances.check_half(y, plain, want)
    bias = float((y.double() * want).sum() / want.square().sum()) - 1.0
    assert abs(bias) < abs(float((plain.double() * want).sum() / want.square().sum()) - 1.0) + 2e-5
