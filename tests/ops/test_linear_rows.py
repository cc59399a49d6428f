"""Rows with an R of their own against an fp64 reference, one row at a time: values, gradients, bits, tracing, input."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import tolerances
import torch
from calls import opcheck, operands_of
from hypothesis import given, settings
from hypothesis import strategies as st
from storages import exact, octets, storage
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear

COUNT = 3  # adapters
INDEX = [0, 2, -1, 2, 0, 2, 1]


def stack(case: reference.Case, count: int = COUNT, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack(
        [case.core * torch.randn(case.core.shape, generator=g).to(case.core.dtype) for _ in range(count)]
    )


def make(dtype: torch.dtype, tokens: int = 2, n: int = 24, m: int = 20, r: int = 5) -> tuple[reference.Case, Tensor]:
    case = reference.make_case((len(INDEX), tokens), n, m, r, dtype)
    return case, stack(case)


def run(case: reference.Case, cores: Tensor, index: Any = INDEX, weight: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dR_k; W as the case has it, or another."""
    x, cores = case.x.clone().requires_grad_(True), cores.clone().requires_grad_(True)
    weight = case.weight if weight is None else weight
    y = lora_sb_linear(x, weight, case.a, cores, case.b, case.bias, case.scaling, index=index)
    dx, dcores = torch.autograd.grad(y, (x, cores), case.dy)
    return y.detach(), dx, dcores


def one_by_one(case: reference.Case, cores: Tensor, index: list[int] = INDEX) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64, a row at a time, with nothing of the library's."""
    exact, cores = case.double(), cores.double()
    ys, dxs, dcores = [], [], torch.zeros_like(cores)
    for i, k in enumerate(index):
        row = reference.Case(
            exact.x[i], exact.weight, exact.a, cores[k] * (k >= 0), exact.b, exact.bias, 0.7, exact.dy[i]
        )
        dx, dcore = reference.gradients(row)
        ys.append(reference.forward(row))
        dxs.append(dx)
        if k >= 0:
            dcores[k] += dcore
    return torch.stack(ys), torch.stack(dxs), dcores


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("r", [1, 5, 16, 40])
def test_each_row_is_that_of_its_adapter(kernel: str, tokens: int, r: int) -> None:
    case, cores = make(torch.float32, tokens, 61, 47, r)
    for result, want in zip(run(case, cores), one_by_one(case, cores), strict=True):
        tolerances.check(result, want, tolerances.fp32(61 + r))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_as_near_as_the_plain_chain_of_each_row(kernel: str, dtype: torch.dtype) -> None:
    case, cores = make(dtype, 9, 61, 47, 16)
    alone: list[list[Tensor]] = [[], []]
    sums = torch.zeros_like(cores)
    for i, k in enumerate(INDEX):
        frozen = case.weight, case.a, cores[k] * (k >= 0), case.b, case.bias, case.scaling
        *results, dcore = reference.plain_chain(reference.Case(case.x[i], *frozen, case.dy[i]))
        for found, value in zip(alone, results, strict=True):
            found.append(value)
        sums[k] += dcore * (k >= 0)
    wanted = one_by_one(case, cores)
    for result, plain, want in zip(run(case, cores), (*map(torch.stack, alone), sums), wanted, strict=True):
        tolerances.check_half(result, plain, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", ["expanded", "transposed", "strided"])
def test_a_gradient_that_is_a_view_is_read_as_its_copy(kernel: str, dtype: torch.dtype, view: str) -> None:
    case, cores = make(dtype, 9, 61, 47, 16)
    rows, m = len(INDEX), 47
    torch.manual_seed(0)
    case.dy = {
        "expanded": torch.ones((), dtype=dtype).expand(rows, 9, m),
        "transposed": torch.randn(m, rows * 9).to(dtype).t().unflatten(0, (rows, 9)),
        "strided": torch.randn(rows, 9, 2 * m).to(dtype)[..., ::2],
    }[view]
    found = run(case, cores)
    case.dy = case.dy.contiguous()
    for result, copied, want in zip(found, run(case, cores), one_by_one(case, cores), strict=True):
        if kernel != "eager":
            assert torch.equal(result, copied)
        elif dtype == torch.float32:  # torch's own products sum in an order that follows strides
            tolerances.check(result, want, tolerances.fp32(61 + 16))
        else:
            tolerances.check_half(result, copied, want)


def test_gradcheck() -> None:
    case, cores = make(torch.float64)
    inputs = case.x.requires_grad_(True), cores.requires_grad_(True)

    def function(x: Tensor, cores: Tensor) -> Tensor:
        return lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, case.scaling, index=INDEX)

    assert torch.autograd.gradcheck(function, inputs, **tolerances.GRADCHECK)


@pytest.mark.parametrize("with_weight", [True, False])
def test_opcheck(with_weight: bool) -> None:
    case, cores = make(torch.float32)
    case.x.requires_grad_(True)
    case.core = cores.requires_grad_(True)
    operands = operands_of(case, base=None if with_weight else (), row_index=torch.tensor(INDEX))
    opcheck("auto", operands, case)


@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
def test_a_quantized_base_is_its_dense_twin(kernel: str, kind: str) -> None:
    case, cores = make(torch.float32, 3, 128, 64, 8)
    dtype = torch.float32
    weight = octets(64, 128, dtype) if kind == "int8" else storage(64, 128, nested=kind != "nf4", dtype=dtype)
    twin = reference.Case(**vars(case) | {"weight": exact(weight, dtype)})
    for result, want in zip(run(case, cores, weight=weight), one_by_one(twin, cores), strict=True):
        tolerances.check(result, want, tolerances.fp32(128 + 8))


def test_without_a_weight_it_is_the_adapters_part() -> None:
    case, cores = make(torch.float64)
    whole = lora_sb_linear(case.x, case.weight, case.a, cores, case.b, case.bias, 0.7, index=INDEX)
    part = lora_sb_linear(case.x, None, case.a, cores, case.b, None, 0.7, index=INDEX)
    tolerances.check(whole, part + case.x @ case.weight.t() + case.bias, tolerances.FP64)


@given(index=st.lists(st.integers(-1, COUNT - 1), min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_permuting_rows_permutes_results_and_keeps_gradients(index: list[int], seed: int) -> None:
    case = reference.make_case((len(index), 2), 12, 10, 3, torch.float64)
    cores = stack(case)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    moved = reference.Case(**vars(case) | {"x": case.x[order], "dy": case.dy[order]})
    y, dx, dcores = run(case, cores, index)
    y2, dx2, dcores2 = run(moved, cores, torch.tensor(index)[order])
    tolerances.check(y2, y[order], tolerances.FP64)
    tolerances.check(dx2, dx[order], tolerances.FP64)
    tolerances.check(dcores2, dcores, tolerances.FP64)


def test_results_repeat_and_do_not_depend_on_threads(kernel: str) -> None:
    case, cores = make(torch.float32, 40, 64, 48, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(run(case, cores)[2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_gradients_of_an_adapter_are_those_that_it_has_alone() -> None:
    """To the bit in eager: dR_k sums t and u of its own rows, whatever stands between them."""
    case, cores = make(torch.float32, 8, 32, 32, 8)
    with lorasb.backend("eager"):
        together = run(case, cores)
        for k in range(COUNT):
            rows = [i for i, other in enumerate(INDEX) if other == k]
            mine = reference.Case(**vars(case) | {"x": case.x[rows], "dy": case.dy[rows]})
            y, dx, dcores = run(mine, cores[k : k + 1], [0] * len(rows))
            tolerances.check(together[0][rows], y, tolerances.fp32(32))
            tolerances.check(together[1][rows], dx, tolerances.fp32(32))
            tolerances.check(together[2][k], dcores[0], tolerances.fp32(16))


def test_what_is_saved_for_backward_is_u_and_nothing_of_xs_size() -> None:
    case, cores = make(torch.float32, 8, 64, 48, 4)
    saved: list[Tensor] = []
    x, cores = case.x.requires_grad_(True), cores.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, index=INDEX)
    frozen = {case.weight.data_ptr(), case.a.data_ptr(), case.b.data_ptr(), cores.data_ptr()}
    extra = [t for t in saved if t.data_ptr() not in frozen]
    assert sum(t.numel() for t in extra) == 8 * len(INDEX) * 4 + len(INDEX)  # u [M, r], and the index


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break_and_checks_the_index_there_too(dynamic: bool) -> None:
    case, cores = make(torch.float32)
    torch._dynamo.reset()

    def function(x: Tensor, cores: Tensor, index: Tensor) -> Tensor:
        return lora_sb_linear(x, case.weight, case.a, cores, case.b, case.bias, index=index).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    index = torch.tensor(INDEX)
    cores = cores.requires_grad_(True)
    case.x.requires_grad_(True)
    grads = []
    for call in (function, compiled):
        cores.grad = None
        call(case.x, cores, index).sum().backward()
        grads.append(cores.grad)
    assert torch.equal(*grads)
    with pytest.raises(IndexError, match=r"expected index in \[-1, 3\).*got 3"):
        compiled(case.x, cores, index + 1)


def test_a_slice_of_a_larger_stack_is_read_where_it_lies(kernel: str) -> None:
    """A bank keeps R's of all layers of an adapter side by side: the stack of one layer has gaps."""
    case, cores = make(torch.float32, 1)
    wide = torch.full((COUNT, 3, *cores.shape[1:]), float("nan"))
    wide[:, 1] = cores
    for one, other in zip(run(case, wide[:, 1]), run(case, cores), strict=True):
        assert torch.equal(one, other)


def test_cores_in_halves_serve(kernel: str) -> None:
    case, cores = make(torch.bfloat16, 1)
    with torch.no_grad():
        given_ = case.x, case.weight, case.a
        y = lora_sb_linear(*given_, cores.bfloat16(), case.b, case.bias, index=INDEX)
        want = lora_sb_linear(*given_, cores.bfloat16().float(), case.b, case.bias, index=INDEX)
    tolerances.check(y, want, tolerances.BF16_FEW)


def test_no_rows_and_no_adapters() -> None:
    case, cores = make(torch.float32)
    empty = reference.Case(**vars(case) | {"x": case.x[:0], "dy": case.dy[:0]})
    y, dx, dcores = run(empty, cores, [])
    assert y.shape == (0, 2, 20)
    assert dx.shape == (0, 2, 24)
    assert not dcores.any()
    base = lora_sb_linear(case.x, case.weight, case.a, cores[:0], case.b, case.bias, index=[-1] * len(INDEX))
    tolerances.check(base, case.x @ case.weight.t() + case.bias, tolerances.fp32(24))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "above": ({"index": [0, 3, 0, 0, 0, 0, 0]}, IndexError, r"expected index in \[-1, 3\), .* got 3"),
    "below": ({"index": [0, -2, 0, 0, 0, 0, 0]}, IndexError, r"got -2"),
    "length": ({"index": [0, 1]}, ValueError, r"an index for each of the rows of x .* got 2 for \[7, 2, 24\]"),
    "dtype": ({"index": torch.zeros(7)}, TypeError, r"expected index \[n\] in int64 on the CPU"),
    "one core": ({"lora_R": torch.zeros(5, 5)}, ValueError, r"expected lora_R \[K, r, r\] with an index of rows"),
    "rank": ({"lora_R": torch.zeros(3, 4, 4)}, ValueError, "ranks differ"),
    "dropout": ({"dropout": 0.5}, ValueError, "expected dropout 0 with an index of rows"),
    "a row": ({"x": torch.zeros(24)}, ValueError, "an index for each of the rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, kind, message = BAD[name]
    case, cores = make(torch.float32)
    given_ = {"x": case.x, "weight": case.weight, "lora_A": case.a, "lora_R": cores, "lora_B": case.b}
    with pytest.raises(kind, match=message):
        lora_sb_linear(**given_ | {"index": INDEX} | change)
