"""Groups with an R for each row: what their members compute alone, by every kernel, with one gradient of x."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import tolerances
import torch
from calls import opcheck, operands_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear, lora_sb_linear_group

INDEX = [0, 2, -1, 2, 0, 1, 2]
WIDTHS = (20, 17, 28)


def make(dtype: torch.dtype, tokens: int = 2, n: int = 24, r: int = 5, bias: bool = True) -> list[reference.Case]:
    """Cases that read the first one's x, each with a stack [3, r, r] for its core."""
    g = torch.Generator().manual_seed(0)
    shape = (len(INDEX), tokens)
    cases = [reference.make_case(shape, n, m, r, dtype, bias, 0.5 + i, seed=i) for i, m in enumerate(WIDTHS)]
    for case in cases:
        case.x = cases[0].x
        case.core = case.core * torch.randn(3, r, r, generator=g).to(case.core.dtype)
    return cases


def operands(cases: list[reference.Case], cores: list[Tensor]) -> list[Any]:
    biases = [case.bias for case in cases if case.bias is not None]
    lists = [case.weight for case in cases], [case.a for case in cases], cores, [case.b for case in cases], biases
    return [*lists, [case.scaling for case in cases]]


def run(cases: list[reference.Case], index: Any = INDEX, used: tuple[int, ...] = (0, 1, 2)) -> list[Tensor | None]:
    """The y_j, dx and the dR_j; the loss reads some of the y_j."""
    x = cases[0].x.clone().requires_grad_(True)
    cores = [case.core.clone().requires_grad_(True) for case in cases]
    ys = lora_sb_linear_group(x, *operands(cases, cores), index=index)
    torch.autograd.backward([ys[i] for i in used], [cases[i].dy for i in used])
    return [*(y.detach() for y in ys), x.grad, *(core.grad for core in cores)]


def one_by_one(cases: list[reference.Case], index: list[int] = INDEX) -> list[Tensor]:
    """In fp64, a member and a row at a time, with nothing of the library's."""
    ys, dx, dcores = [], torch.zeros_like(cases[0].x, dtype=torch.float64), []
    for case in (case.double() for case in cases):
        y, dcore = [], torch.zeros_like(case.core)
        for i, k in enumerate(index):
            core = case.core[k] * (k >= 0)
            row = reference.Case(case.x[i], case.weight, case.a, core, case.b, case.bias, case.scaling, case.dy[i])
            dx_i, dcore_i = reference.gradients(row)
            y.append(reference.forward(row))
            dx[i] += dx_i
            dcore[k] += dcore_i * (k >= 0)
        ys.append(torch.stack(y))
        dcores.append(dcore)
    return [*ys, dx, *dcores]


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_each_row_is_that_of_its_adapter_in_every_member(kernel: str, tokens: int, bias: bool) -> None:
    cases = make(torch.float32, tokens, bias=bias)
    for result, want in zip(run(cases), one_by_one(cases), strict=True):
        tolerances.check(result, want, tolerances.fp32(sum(WIDTHS) + 3 * 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_as_near_as_members_alone(kernel: str, dtype: torch.dtype) -> None:
    cases = make(dtype, 9, 61, 16)
    alone: list[list[Tensor]] = [[], [], []]
    for case in cases:
        x, cores = case.x.clone().requires_grad_(True), case.core.clone().requires_grad_(True)
        y = lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, case.scaling, index=INDEX)
        for found, value in zip(alone, (y.detach(), *torch.autograd.grad(y, (x, cores), case.dy)), strict=True):
            found.append(value)
    plain = [*alone[0], alone[1][0] + alone[1][1] + alone[1][2], *alone[2]]
    for result, chain, want in zip(run(cases), plain, one_by_one(cases), strict=True):
        tolerances.check_half(result, chain, want)


@given(index=st.lists(st.integers(-1, 2), min_size=len(INDEX), max_size=len(INDEX)))
@settings(max_examples=20, deadline=None)
def test_any_rows_are_those_of_the_members_alone(index: list[int]) -> None:
    cases = make(torch.float64)
    for result, want in zip(run(cases, index), one_by_one(cases, index), strict=True):
        tolerances.check(result, want, tolerances.FP64)


def test_gradcheck() -> None:
    cases = make(torch.float64, 1, 8, 3)
    inputs = [cases[0].x.requires_grad_(True), *(case.core.requires_grad_(True) for case in cases)]

    def function(x: Tensor, *cores: Tensor) -> tuple[Tensor, ...]:
        return tuple(lora_sb_linear_group(x, *operands(cases, list(cores)), index=INDEX))

    assert torch.autograd.gradcheck(function, inputs, **tolerances.GRADCHECK)


def test_opcheck() -> None:
    cases = make(torch.float32)
    for case in cases:
        case.core.requires_grad_(True)
    cases[0].x.requires_grad_(True)
    opcheck("auto", operands_of(*cases, row_index=torch.tensor(INDEX)), *cases)


def test_an_output_that_the_loss_does_not_use_adds_nothing(kernel: str) -> None:
    cases = make(torch.float32)
    found = run(cases, used=(0, 2))
    assert found[5] is None
    want = one_by_one([cases[0], cases[2]])
    for result, expected in zip([found[0], found[2], found[3], found[4], found[6]], want, strict=True):
        tolerances.check(result, expected, tolerances.fp32(sum(WIDTHS) + 15))


def test_gradients_of_a_member_are_those_that_it_has_alone(kernel: str) -> None:
    """To the bit: what the others hold does not matter."""
    cases = make(torch.float32)
    found = run(cases)
    for i, case in enumerate(cases):
        x, cores = case.x.clone().requires_grad_(True), case.core.clone().requires_grad_(True)
        y = lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, case.scaling, index=INDEX)
        assert torch.equal(found[4 + i], torch.autograd.grad(y, cores, case.dy)[0])
        assert torch.equal(found[i], y)


def test_what_is_saved_for_backward_is_the_us() -> None:
    cases = make(torch.float32)
    saved: list[Tensor] = []
    cores = [case.core.requires_grad_(True) for case in cases]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_sb_linear_group(cases[0].x.requires_grad_(True), *operands(cases, cores), index=INDEX)
    frozen = {t.data_ptr() for case in cases for t in (case.weight, case.a, case.b, case.core)}
    extra = [t for t in saved if t.data_ptr() not in frozen]
    assert sum(t.numel() for t in extra) == 3 * 2 * len(INDEX) * 5 + len(INDEX)  # the u_j [M, r], and the index


def test_autocast_casts_as_for_members_alone() -> None:
    cases = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        *ys, _, _, _, _ = run_cast(cases)
        for y, case in zip(ys, cases, strict=True):
            given_ = case.x, case.weight, case.a, case.core, case.b, case.bias, case.scaling
            assert torch.equal(y, lora_sb_linear(*given_, index=INDEX))
            assert y.dtype == torch.bfloat16


def run_cast(cases: list[reference.Case]) -> list[Tensor | None]:
    for case in cases:
        case.dy = case.dy.bfloat16()
    return run(cases)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_and_checks_the_index_there_too(dynamic: bool) -> None:
    cases = make(torch.float32)
    torch._dynamo.reset()

    def function(x: Tensor, cores: list[Tensor], index: Tensor) -> Tensor:
        return torch.cat(lora_sb_linear_group(x, *operands(cases, cores), index=index), -1).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    cores, index = [case.core.requires_grad_(True) for case in cases], torch.tensor(INDEX)
    cases[0].x.requires_grad_(True)
    found = [torch.autograd.grad(call(cases[0].x, cores, index).sum(), cores) for call in (function, compiled)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(IndexError, match=r"expected index in \[-1, 3\).*got 3"):
        compiled(cases[0].x, cores, index + 1)


def test_no_rows() -> None:
    cases = make(torch.float32)
    for case in cases:
        case.x, case.dy = case.x[:0], case.dy[:0]
    *ys, dx, first, _, _ = run(cases, [])
    assert [tuple(y.shape) for y in ys] == [(0, 2, m) for m in WIDTHS]
    assert dx.shape == (0, 2, 24)
    assert not first.any()


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "above": ({"index": [0, 3, 0, 0, 0, 0, 0]}, IndexError, r"expected index in \[-1, 3\), .* got 3"),
    "length": ({"index": [0, 1]}, ValueError, r"an index for each of the rows of x .* got 2 for \[7, 2, 24\]"),
    "one core": ({"lora_R": [torch.zeros(5, 5)] * 3}, ValueError, r"expected lora_R \[K, r, r\] with an index of rows"),
    "members": ({"lora_R": [torch.zeros(3, 5, 5)] * 2}, ValueError, "expected one of each argument for every member"),
    "ranks": ({"lora_A": [torch.zeros(4, 24), *[torch.zeros(5, 24)] * 2]}, ValueError, "one rank for all members"),
    "dropout": ({"dropout": 0.5}, ValueError, "expected dropout 0 with an index of rows"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_bad_input(name: str, backend: str) -> None:
    change, kind, message = BAD[name]
    cases = make(torch.float32)
    names = ("weights", "lora_A", "lora_R", "lora_B", "biases", "scalings")
    given_ = dict(zip(names, operands(cases, [case.core for case in cases]), strict=True))
    with lorasb.backend(backend), pytest.raises(kind, match=message):
        lora_sb_linear_group(cases[0].x, **given_ | {"index": INDEX} | change)


def test_a_group_needs_weights_and_takes_stacks_of_several_dtypes(kernel: str) -> None:
    cases = make(torch.float32)
    lists = operands(cases, [case.core for case in cases])
    with pytest.raises(ValueError, match="expected one of each argument for every member"):
        lora_sb_linear_group(cases[0].x, [], *lists[1:], index=INDEX)
    lists[2] = [lists[2][0], *(core.double() for core in lists[2][1:])]
    want = lora_sb_linear_group(cases[0].x, *operands(cases, [case.core for case in cases]), index=INDEX)
    for one, other in zip(lora_sb_linear_group(cases[0].x, *lists, index=INDEX), want, strict=True):
        tolerances.check(one, other.double(), tolerances.fp32(100))
