"""Rows with an R of their own, and groups: what their adapters and members compute alone, whatever the others hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tolerances
import torch
from calls import INDEX, exact, make_call, run
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import threads

from lorasb.functional import lora_sb_linear

GROUPS = ("group", "rows of a group")


@pytest.mark.parametrize("kind", ["rows", "rows of a group"])
@given(index=st.lists(st.integers(-1, 2), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_any_index(kind: str, index: list[int]) -> None:
    cases, _ = make_call(kind, torch.float64, (2,), 12, 10, 3)
    rows = len(index)
    cases = [replace(case, x=case.x[:rows], dy=case.dy[:rows]) for case in cases]
    for given_ in (index, torch.tensor(index)):
        tolerances.check(run(*cases, index=given_), exact(*cases, index=index), tolerances.FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", ["expanded", "transposed", "strided"])
def test_a_gradient_that_is_a_view_is_read_as_its_copy(kernel: str, dtype: torch.dtype, view: str) -> None:
    (case,), options = make_call("rows", dtype, (9,), 61, 47, 16)
    rows, m = len(INDEX), 47
    torch.manual_seed(0)
    case.dy = {
        "expanded": torch.ones((), dtype=dtype).expand(rows, 9, m),
        "transposed": torch.randn(m, rows * 9).to(dtype).t().unflatten(0, (rows, 9)),
        "strided": torch.randn(rows, 9, 2 * m).to(dtype)[..., ::2],
    }[view]
    found = run(case, **options)
    case.dy = case.dy.contiguous()
    for result, copied, want in zip(found, run(case, **options), exact(case, **options), strict=True):
        if kernel != "eager":
            assert torch.equal(result, copied)
        elif dtype == torch.float32:  # torch's own products sum in an order that follows strides
            tolerances.check(result, want, tolerances.fp32(61 + 16))
        else:
            tolerances.check_half(result, copied, want)


def test_results_repeat_and_do_not_depend_on_threads(kernel: str) -> None:
    (case,), options = make_call("rows", torch.float32, (40,), 64, 48, 16)
    found = []
    for count in (1, 2, 2):
        with threads(count):
            found.append(run(case, **options)[2])
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_slice_of_a_larger_stack_is_read_where_it_lies(kernel: str) -> None:
    """A bank keeps R's of all layers of an adapter side by side: the stack of one layer has gaps."""
    (case,), options = make_call("rows", torch.float32, (1,))
    wide = torch.full((3, 3, *case.core.shape[1:]), float("nan"))
    wide[:, 1] = case.core
    tolerances.check_equal(run(replace(case, core=wide[:, 1]), **options), run(case, **options))


def test_cores_in_halves_serve(kernel: str) -> None:
    (case,), options = make_call("rows", torch.bfloat16, (1,))
    with torch.no_grad():
        given_, rest, half = (case.x, case.weight, case.a), (case.b, case.bias), case.core.bfloat16()
        y, want = (lora_sb_linear(*given_, core, *rest, **options) for core in (half, half.float()))
    tolerances.check(y, want, tolerances.BF16_FEW)


def test_without_adapters_rows_are_the_bases() -> None:
    (case,), _ = make_call("rows", torch.float32)
    y = lora_sb_linear(case.x, case.weight, case.a, case.core[:0], case.b, case.bias, index=[-1] * len(INDEX))
    tolerances.check(y, case.x @ case.weight.t() + case.bias, tolerances.fp32(64))


@pytest.mark.parametrize("kind", GROUPS)
def test_an_output_that_the_loss_does_not_use_adds_nothing(kernel: str, kind: str) -> None:
    cases, options = make_call(kind, torch.float32)
    first, _, third, dx, dfirst, unused, dthird = run(*cases, used=(0, 2), **options)
    assert unused is None
    wanted = exact(cases[0], cases[2], **options)
    tolerances.check((first, third, dx, dfirst, dthird), wanted, tolerances.fp32(3 * 37 + 15))


@pytest.mark.parametrize("kind", GROUPS)
def test_results_of_a_member_are_those_that_it_has_alone(kernel: str, kind: str) -> None:
    cases, options = make_call(kind, torch.float32)
    found = run(*cases, **options)
    for j, case in enumerate(cases):
        y, _, dcore = run(case, **options)
        assert torch.equal(found[j], y)
        assert torch.equal(found[4 + j], dcore)


def test_stacks_of_several_dtypes_are_taken(kernel: str) -> None:
    cases, options = make_call("rows of a group", torch.float32)
    mixed = [cases[0], *(replace(case, core=case.core.double()) for case in cases[1:])]
    tolerances.check(run(*mixed, **options)[:3], run(*cases, **options)[:3], tolerances.fp32(100))
