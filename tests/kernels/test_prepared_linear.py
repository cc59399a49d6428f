"""Prepared launches of the adapted linear: the bits of ordinary ones, on compiled kernels (`--ptx`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import environment
import pytest
import torch
from calls import check, run_kernels
from kernel_cases import group_cases, planned
from reference import Case, make_case
from tolerances import check_equal
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear
from lorasb.kernels import linear, plan, prepared_linear
from lorasb.kernels.launcher import observed

pytestmark = pytest.mark.skipif(not environment.PTX, reason="executes compiled kernels: pytest --ptx sm_86")
SHAPES = {
    "decode": (3, 128, 80, 16),
    "aligned": (64, 128, 128, 64),
    "ragged": (70, 100, 136, 24),
    "long": (20, 1024, 64, 16),
}


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    prepared_linear.forget()
    yield
    prepared_linear.forget()


def kinds() -> int:
    """How many kinds of calls are prepared."""
    return len(prepared_linear._forwards) + len(prepared_linear._backwards)


def same_bits(call: Callable[[], Any], patch: pytest.MonkeyPatch) -> Any:
    """The results of a call by prepared launches, and of one that repeats them: those of ordinary launches."""
    prepared_linear.forget()
    torch.manual_seed(3)
    with observed():  # who watches launches gets ordinary ones
        wanted = call()
    assert not kinds()
    with patch.context() as inner:
        for way in (linear.forward, linear.backward):
            inner.setattr(linear, way.__name__, lambda *_: pytest.fail("an ordinary launch"))
        for _ in range(2):
            torch.manual_seed(3)
            results = call()
            check_equal(results, wanted)
    assert kinds()
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    M, n, m, r = SHAPES[shape]
    case = make_case((M,), n, m, r, dtype, bias=shape == "aligned")
    check(same_bits(lambda: run_kernels(case), monkeypatch), case)
    others = make_case((M,), n, m, r, dtype, bias=shape == "aligned", seed=9)
    check(run_kernels(others), others)  # a repetition with other tensors
    assert kinds() == 2  # one forward, one backward


CALLS = {
    "group without padding": group_cases(20, 96, (80, 64, 72), 64, torch.bfloat16),
    "dimensions": [make_case((2, 3, 4), 64, 48, 8, torch.bfloat16)],
    "group": group_cases(20, 96, (80, 64, 72), 24, torch.bfloat16),  # beside cuBLAS, ranks are padded
    "group in fp16": group_cases(20, 64, (48, 32, 40), 24, torch.float16),
    "no W": [replace(make_case((20,), 64, 48, 8, torch.bfloat16, bias=False), weight=None)],
}


@pytest.mark.parametrize(
    ("kind", "path"), [*((kind, "addmm") for kind in list(CALLS)[:3]), *((kind, "fused") for kind in list(CALLS)[1:])]
)
def test_kinds_of_calls(kind: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = CALLS[kind]
    with planned(path=path):
        check(same_bits(lambda: run_kernels(*cases), monkeypatch), *cases)
        same_bits(lambda: run_kernels(*cases, dropout=0.4), monkeypatch)


def test_each_call_has_a_seed_of_its_own() -> None:
    case = make_case((2, 3, 4), 64, 48, 8, torch.bfloat16)
    assert not torch.equal(*(run_kernels(case, dropout=0.4)[0] for _ in range(2)))


@pytest.mark.parametrize("needed", ["dx", "dR"])
def test_one_gradient_alone(needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((20,), 64, 48, 8, torch.bfloat16)

    def call() -> list[Tensor]:
        x, core = case.x.clone().requires_grad_(needed == "dx"), case.core.clone().requires_grad_(needed == "dR")
        with lorasb.backend("triton"):
            y = lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling)
        return list(torch.autograd.grad(y, x if needed == "dx" else core, case.dy))

    same_bits(call, monkeypatch)


def test_what_cannot_be_repeated_is_launched_the_ordinary_way() -> None:
    case = make_case((20,), 64, 48, 8, torch.bfloat16)
    wanted = run_kernels(case)
    shifted = torch.empty(20 * 64 + 1, dtype=torch.bfloat16)[1:].view(20, 64).copy_(case.x)
    for x in (shifted, torch.empty(64, 20, dtype=torch.bfloat16).t().copy_(case.x)):  # not aligned; no rows
        check_equal(run_kernels(case, x=x.detach()), wanted)
    turned = replace(case, core=case.core.t().contiguous().t())  # the kernels take a copy of it
    check(run_kernels(turned), turned)
    check(run_kernels(turned), turned)


def test_nothing_is_launched_before_all_pointers_are_known_to_be_aligned() -> None:
    """A is read after cuBLAS alone, where dropout's masked term is added to its dx."""
    case = make_case((20,), 64, 48, 8, torch.bfloat16)
    shifted = torch.empty(8 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 64).copy_(case.a)
    with planned(path="addmm"):
        check_equal(*(run_kernels(replace(case, a=a), dropout=0.3, seed=3) for a in (case.a, shifted)))


def test_a_gradient_that_is_one_number_is_no_matrix_of_rows() -> None:
    case = make_case((20,), 64, 48, 8, torch.bfloat16)
    case.dy = torch.ones(()).to(torch.bfloat16).expand(20, 48)
    check(run_kernels(case), case)


def test_new_tables_prepare_anew() -> None:
    case = make_case((20,), 64, 48, 8, torch.bfloat16)
    run_kernels(case)
    before = kinds()
    plan.forget()
    run_kernels(case)
    assert kinds() == 2 * before


def test_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_linear, "MOST_KINDS", 2)
    for M in (1, 2, 3):
        case: Case = make_case((M,), 32, 32, 8, torch.bfloat16)
        check(run_kernels(case), case)
        assert kinds() <= 2
