"""Dense layers in bf16 and fp16 in C++. Processors that cannot multiply them widen W one panel at a time. Those that
multiply bf16 compute the forward of few tokens with W read in place.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from calls import check_pooled, exact, opcheck, outputs, run
from kernel_cases import group_cases
from measuring import SETS, allocations, instruction_set, threads
from tolerances import EXACT, HALF_FEW, check
from torch import Tensor

import lorasb
from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear

BF16, SIXTEEN_BIT = torch.bfloat16, (torch.bfloat16, torch.float16)
BY_BF16 = [name for name in SETS if name in ("AMX", "AVX-512 with bf16")]  # instruction sets that multiply bf16
WIDENING = [name for name in SETS if name not in BY_BF16]
pytestmark = pytest.mark.skipif(not SETS, reason="no C++ extension")


@pytest.fixture(params=WIDENING)
def widening(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor that does not multiply bf16."""
    with instruction_set(request.param), lorasb.backend("cpp"):
        assert cpp.serves(BF16)
        yield request.param


@pytest.fixture(params=BY_BF16)
def multiplying(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor that multiplies bf16."""
    with instruction_set(request.param), lorasb.backend("cpp"):
        assert cpp.most_tokens(64) > 0
        yield request.param


ROWS = (1, 3, 4, 5, 6, 13, 64, 97)  # one token, a walk over rows of W, full and partial micro-panels


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "m", "r"),
    [(rows, 123, 59, 17) for rows in ROWS]
    + [(rows, *shape) for rows in (1, 6, 97) for shape in ((64, 300, 24), (520, 48, 16))]
    + [(1100, 40, 24, 20)],  # more tokens than are summed at once
)
def test_as_near_to_fp64_as_the_plain_chain(
    widening: str, rows: int, n: int, m: int, r: int, dtype: torch.dtype
) -> None:
    check_pooled(rows, n, m, r, dtype)


def test_more_tokens_than_are_packed_at_once(widening: str) -> None:
    """A sum over many features is computed in parts of its tokens; each part has the same bits as in its own call."""
    n = 1 << 15
    case = reference.make_case((1040,), n, 8, 4, torch.bfloat16)
    y, dx, dcore = run(case)
    parts = [run(replace(case, x=x, dy=dy)) for x, dy in zip(case.x.split(512), case.dy.split(512), strict=True)]
    assert torch.equal(y, torch.cat([part[0] for part in parts]))
    assert torch.equal(dx, torch.cat([part[1] for part in parts]))
    check(dcore, reference.gradients(case.double())[1], HALF_FEW)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_a_weight_that_is_stored_transposed(widening: str, rows: int, dtype: torch.dtype) -> None:
    case = reference.make_case((rows,), 96, 50, 8, dtype)
    want = run(case)
    case.weight = case.weight.t().contiguous().t()
    check(run(case), want, HALF_FEW)
    assert torch.equal(run(case)[2], want[2])


@pytest.mark.parametrize("rows", [0, 2, 40])
def test_without_bias_weight_or_tokens(widening: str, rows: int) -> None:
    case = reference.make_case((rows, 2), 64, 33, 8, torch.bfloat16, bias=False)
    for one in (case, replace(case, weight=None)):
        check(run(one)[:2], exact(one)[:2], HALF_FEW)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_dropout_drops_what_eager_drops(widening: str, rows: int, dtype: torch.dtype) -> None:
    case = reference.make_case((rows,), 96, 50, 8, dtype)
    ours = run(case, dropout=0.4, seed=5)
    check(ours, run(case, dropout=0.4, seed=5, backend="eager"), HALF_FEW)


@pytest.mark.parametrize("rows", [2, 4, 40, 600])
@pytest.mark.parametrize("bias", [True, False])
def test_a_group_is_its_members(widening: str, rows: int, bias: bool) -> None:
    cases = group_cases(rows, 64, (48, 16, 80), 8, torch.bfloat16, bias)
    found = run(*cases)
    for j, case in enumerate(cases):
        alone = run(case)
        assert torch.equal(found[j], alone[0])
        assert torch.equal(found[4 + j], alone[2])
    check(found[3], exact(*cases)[3], HALF_FEW)


@pytest.mark.parametrize("rows", [1, 3, 40, 200])
def test_the_same_bits_again_and_by_any_number_of_threads(widening: str, rows: int) -> None:
    case = reference.make_case((rows,), 700, 330, 16, torch.bfloat16)
    first = run(case)
    for count in (1, 2, 3, 2):
        with threads(count):
            check(run(case), first, EXACT)


def test_no_weight_in_fp32_exists(widening: str) -> None:
    m, n = 4096, 2048
    case = reference.make_case((40,), n, m, 8, torch.bfloat16)
    with allocations() as held:
        x, core = case.x.requires_grad_(), case.core.requires_grad_()
        lora_sb_linear(x, case.weight, case.a, core, case.b).backward(case.dy)
    assert max(held) < m * n  # a quarter of W in fp32, activations and their copies included


@pytest.mark.parametrize("widening", WIDENING[:1], indirect=True)
def test_opcheck(widening: str) -> None:
    case = reference.make_case((2, 3), 40, 24, 3, torch.bfloat16)
    opcheck("cpp", case)
    opcheck("cpp", case, case, dropout=0.5, seeds=torch.tensor([3, 4]))


BAD = {
    "weight": (lambda c: {"weight": c.weight.t()}, ValueError, r"expected weight \[24, 40\]"),
    "weight's dtype": (lambda c: {"weight": c.weight.float()}, TypeError, "weight in x's dtype"),
    "bias": (lambda c: {"bias": c.bias[1:]}, ValueError, r"expected a bias \[24\]"),
    "fp64": (lambda c: {"x": c.x.double(), "a": c.a.double(), "b": c.b.double()}, TypeError, "x in fp32, bf16 or fp16"),
    "ranks": (lambda c: {"core": c.core[1:]}, ValueError, r"expected A \[r, in\]"),
    "features": (lambda c: {"x": c.x[..., 1:]}, ValueError, r"expected \[\.\.\., 40\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_extension_checks_what_it_is_given(widening: str, name: str) -> None:
    change, kind, message = BAD[name]
    c = reference.make_case((3,), 40, 24, 3, torch.bfloat16)
    given = {"x": c.x, "weight": c.weight, "a": c.a, "core": c.core, "b": c.b, "bias": c.bias} | change(c)
    with pytest.raises(kind, match=message):
        torch.ops.lorasb_csrc.dense_linear(*given.values(), 1.0, 0.0, None)


# Half panels of 32 tokens, full panels, and remainders; all within AMX's bound.
FEW = (1, 2, 5, 15, 16, 17, 31, 32, 33, 64, 100)
SHAPES = ((64, 96, 32), (123, 59, 17), (31, 33, 3), (576, 48, 16))  # n, m, r: with and without partial tiles


def op(x: Tensor, case: reference.Case) -> Tensor:
    """y of the extension's op, even if another path would be chosen for x."""
    y: Tensor
    y, _ = torch.ops.lorasb_csrc.dense_linear(
        x, case.weight, case.a, case.core, case.b, case.bias, case.scaling, 0.0, None
    )
    return y


def make(rows: int, n: int, m: int, r: int, **options: Any) -> reference.Case:
    return reference.make_case((rows,), n, m, r, BF16, **options)


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("rows", FEW)
@pytest.mark.parametrize(("n", "m", "r"), SHAPES)
def test_few_tokens_are_as_near_to_fp64_as_the_plain_chain(
    multiplying: str, rows: int, n: int, m: int, r: int, bias: bool
) -> None:
    if rows > cpp.most_tokens(m * n):
        pytest.skip(f"torch computes {rows} tokens on {multiplying}")
    case = make(rows, n, m, r)
    assert cpp.computes(case.x, [case.weight])
    check_pooled(rows, n, m, r, BF16, bias=bias)


def test_the_result_is_one_sum_that_is_rounded_once(multiplying: str) -> None:
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
def test_bits_depend_on_neither_threads_nor_other_tokens(multiplying: str, count: int) -> None:
    case = make(min(100, cpp.most_tokens(576 * 1000)), 576, 1000, 24)
    want = op(case.x, case)
    with threads(count):
        assert torch.equal(op(case.x, case), want)
        for tokens in (1, 3, len(case.x) - 1):
            assert torch.equal(op(case.x[:tokens], case), want[:tokens])


def test_a_group_and_rows_have_the_same_bits_as_layers_and_adapters_alone(multiplying: str) -> None:
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


def test_what_is_left_to_torch(multiplying: str) -> None:
    most, weight = cpp.most_tokens(32 * 64), torch.zeros(32, 64, dtype=BF16)
    x = torch.zeros(most, 64, dtype=BF16)
    assert cpp.computes(x, [weight])
    assert cpp.computes(x.view(1, most, 64), [weight, weight])
    assert not cpp.computes(torch.zeros(most + 1, 64, dtype=BF16), [weight])
    assert not cpp.computes(x[:0], [weight])
    assert not cpp.computes(x, [weight, torch.zeros(64, 32, dtype=BF16).t()])
    assert not cpp.computes(x, [])
    if multiplying != "AMX":  # without tiles, the BLAS is faster above a certain number of products
        assert [cpp.most_tokens(elements) for elements in (2**19, 2**21, 2**30)] == [128, 47, 16]
        assert not cpp.computes(x, [weight, weight.expand(2**16, 32, 64).reshape(-1, 64)])
    assert not cpp.computes(x.float(), [weight.float()])
