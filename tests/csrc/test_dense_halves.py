"""Dense layers in bf16 and fp16 on processors that do not multiply them: W is widened a panel at a time, in C++."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import reference
import torch
from calls import check_pooled, exact, opcheck, run
from kernel_cases import group_cases
from measuring import SETS, allocations, instruction_set, threads
from tolerances import EXACT, HALF_FEW, check

import lorasb
from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
ROWS = (1, 3, 4, 5, 6, 13, 64, 97)  # one token, a walk over rows of W, micro-panels that are full and that are not
pytestmark = pytest.mark.skipif(not SETS, reason="no C++ extension")


@pytest.fixture(params=SETS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor that does not multiply bf16."""
    with instruction_set(request.param), lorasb.backend("cpp"):
        if not cpp.serves(torch.bfloat16):
            pytest.skip(f"{request.param} multiplies bf16 natively")
        yield request.param


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "m", "r"),
    [(rows, *shape) for rows in ROWS for shape in ((123, 59, 17), (64, 300, 24), (520, 48, 16))]
    + [(1100, 40, 24, 20)],  # more tokens than are open at once
)
def test_as_near_to_fp64_as_the_plain_chain(kernel: str, rows: int, n: int, m: int, r: int, dtype: torch.dtype) -> None:
    check_pooled(rows, n, m, r, dtype)


def test_more_tokens_than_are_packed_at_once(kernel: str) -> None:
    """A sum over many features takes its tokens part by part; the parts are the same bits as one call of each."""
    n = 1 << 15
    case = reference.make_case((1040,), n, 8, 4, torch.bfloat16)
    y, dx, dcore = run(case)
    parts = [run(replace(case, x=x, dy=dy)) for x, dy in zip(case.x.split(512), case.dy.split(512), strict=True)]
    assert torch.equal(y, torch.cat([part[0] for part in parts]))
    assert torch.equal(dx, torch.cat([part[1] for part in parts]))
    check(dcore, reference.gradients(case.double())[1], HALF_FEW)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_a_weight_that_is_stored_transposed(kernel: str, rows: int, dtype: torch.dtype) -> None:
    case = reference.make_case((rows,), 96, 50, 8, dtype)
    want = run(case)
    case.weight = case.weight.t().contiguous().t()
    check(run(case), want, HALF_FEW)
    assert torch.equal(run(case)[2], want[2])


@pytest.mark.parametrize("rows", [0, 2, 40])
def test_without_bias_weight_or_tokens(kernel: str, rows: int) -> None:
    case = reference.make_case((rows, 2), 64, 33, 8, torch.bfloat16, bias=False)
    for one in (case, replace(case, weight=None)):
        check(run(one)[:2], exact(one)[:2], HALF_FEW)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_dropout_drops_what_eager_drops(kernel: str, rows: int, dtype: torch.dtype) -> None:
    case = reference.make_case((rows,), 96, 50, 8, dtype)
    ours = run(case, dropout=0.4, seed=5)
    check(ours, run(case, dropout=0.4, seed=5, backend="eager"), HALF_FEW)


@pytest.mark.parametrize("rows", [2, 4, 40, 600])
@pytest.mark.parametrize("bias", [True, False])
def test_a_group_is_its_members(kernel: str, rows: int, bias: bool) -> None:
    cases = group_cases(rows, 64, (48, 16, 80), 8, torch.bfloat16, bias)
    found = run(*cases)
    for j, case in enumerate(cases):
        alone = run(case)
        assert torch.equal(found[j], alone[0])
        assert torch.equal(found[4 + j], alone[2])
    check(found[3], exact(*cases)[3], HALF_FEW)


@pytest.mark.parametrize("rows", [1, 3, 40, 200])
def test_the_same_bits_again_and_by_any_number_of_threads(kernel: str, rows: int) -> None:
    case = reference.make_case((rows,), 700, 330, 16, torch.bfloat16)
    first = run(case)
    for count in (1, 2, 3, 2):
        with threads(count):
            check(run(case), first, EXACT)


def test_no_weight_in_fp32_exists(kernel: str) -> None:
    m, n = 4096, 2048
    case = reference.make_case((40,), n, m, 8, torch.bfloat16)
    with allocations() as held:
        x, core = case.x.requires_grad_(), case.core.requires_grad_()
        lora_sb_linear(x, case.weight, case.a, core, case.b).backward(case.dy)
    assert max(held) < m * n  # a quarter of W in fp32, activations and their copies included


def test_opcheck(kernel: str) -> None:
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
def test_the_extension_checks_what_it_is_given(kernel: str, name: str) -> None:
    change, kind, message = BAD[name]
    c = reference.make_case((3,), 40, 24, 3, torch.bfloat16)
    given = {"x": c.x, "weight": c.weight, "a": c.a, "core": c.core, "b": c.b, "bias": c.bias} | change(c)
    with pytest.raises(kind, match=message):
        torch.ops.lorasb_csrc.dense_linear(*given.values(), 1.0, 0.0, None)
