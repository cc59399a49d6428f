"""Every kind of call against independent references: values, gradients, memory, determinism, tracing, dropout, bad
input. Rows with an R each, and members of groups, give the same results as alone, whatever the others contain.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import calls
import pytest
import reference
import storages
import tolerances
import torch
from calls import FEW, INDEX, KINDS, MASKED, check, check_pooled, exact, make_call, operands_of, outputs, run
from hypothesis import given, settings
from hypothesis import strategies as st
from measuring import saved_for_backward, threads
from naive_backend import NAIVE
from torch import Tensor

import lorasb
from lorasb.backends import cpp
from lorasb.backends import eager as by_torch
from lorasb.functional import lora_sb_linear, lora_sb_linear_group

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "eager", *(("cpp",) if cpp.missing() is None else ()))
PRODUCTS = ("dense", "no bias", "no W", "group", "group without biases")  # small ones may be composed of torch's ops
GROUPS = ("group", "rows of a group")
long = pytest.mark.long


@pytest.mark.parametrize(("tokens", "n", "m", "r"), [((), 61, 47, 5), ((3,), 128, 64, 16), ((9,), 61, 47, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_exact_to_rounding(kernel: str, kind: str, tokens: tuple[int, ...], n: int, m: int, r: int) -> None:
    cases, options = make_call(kind, torch.float32, tokens, n, m, r)
    check(run(*cases, **options), *cases, **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_as_near_to_fp64_as_the_plain_chain(kernel: str, kind: str, dtype: torch.dtype) -> None:
    cases, options = make_call(kind, dtype, (9,), 61, 47, 20)
    check(run(*cases, **options), *cases, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "m", "r"),
    [(1, 123, 59, 17), (63, 123, 59, 1), (63, 123, 59, 3), (63, 123, 59, 16), (1023, 123, 59, 59), (63, 2048, 512, 96)]
    + [pytest.param(rows, 123, 59, r, marks=long) for rows in (1, 63, 1023) for r in (1, 3, 16, 17, 59)]
    + [pytest.param(63, 4096, 1024, r, marks=long) for r in (64, 96, 128)],
)
def test_a_dense_layer_of_any_size(composed: bool, rows: int, n: int, m: int, r: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        case = reference.make_case((rows,), n, m, r, dtype)
        check(run(case), case)
    else:
        check_pooled(rows, n, m, r, dtype, cores=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("r", [3, pytest.param(1, marks=long)])
def test_small_cores_in_16_bits(composed: bool, r: int, dtype: torch.dtype) -> None:
    check_pooled(6, 12, 10, r, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kernel: str, kind: str) -> None:
    cases, options = make_call(kind, torch.float32)
    empty = [replace(case, x=cases[0].x[:0], dy=case.dy[:0]) for case in cases]
    results = run(*empty, **{name: [] for name in options})
    *ys, dx = results[: len(cases) + 1]
    assert [tuple(y.shape) for y in ys] == [(0, 2, case.b.shape[0]) for case in cases]
    assert dx.shape == (0, 2, 64)
    assert not any(dcore.any() for dcore in results[len(cases) + 1 :])


@pytest.mark.usefixtures("composed")
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple),
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    rank=st.integers(1, 40),
    bias=st.booleans(),
    scaling=st.floats(-4, 4).filter(lambda s: abs(s) > 1e-3),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shape: tuple[int, ...], n: int, m: int, rank: int, bias: bool, scaling: float, seed: int) -> None:
    case = reference.make_case(shape, n, m, min(rank, n, m), torch.float64, bias, scaling, seed)
    tolerances.check(run(case), exact(case), tolerances.FP64)


def test_non_contiguous_x_and_dy(composed: bool) -> None:
    case = reference.make_case((6, 4), 24, 20, 4, torch.float32)
    want = run(case)
    wide = torch.randn(4, 6, 48)
    wide[..., ::2] = case.x.transpose(0, 1)
    x = wide[..., ::2].transpose(0, 1).detach()
    assert not x.is_contiguous()
    case.dy = case.dy.transpose(0, 1).contiguous().transpose(0, 1)
    tolerances.check(run(case, x=x), want, tolerances.fp32(24))


@pytest.mark.parametrize(
    ("kind", "small_bytes"),
    [pytest.param(kind, 0, marks=() if kind in (*FEW, "dropout") else long) for kind in (*KINDS, "dropout")]
    + [(kind, 2**40) for kind in PRODUCTS],
)
@pytest.mark.parametrize("backend", ["auto", pytest.param("eager", marks=long)])
def test_gradcheck(backend: str, kind: str, small_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_torch, "SMALL_BYTES", small_bytes)
    cases, options = make_call(kind, torch.float64, (), 6, 4, 3)

    def function(x: Tensor, *cores: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return tuple(outputs(cases, x, cores, **options))

    inputs = cases[0].x.requires_grad_(True), *(case.core.requires_grad_(True) for case in cases)
    with lorasb.backend(backend):
        assert torch.autograd.gradcheck(function, inputs, **tolerances.GRADCHECK)
        if kind != "dropout":
            tolerances.check(function(*inputs), exact(*cases, **options)[: len(cases)], tolerances.FP64)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("dense", name) for name in BACKENDS if name != "cpp"]  # same kernel as "auto"
    + [(kind, "auto") for kind in ("no W", "frozen core", "frozen x", "dropout", "dropout of a group", "int8", "rows")]
    + [("nf4", BACKENDS[-1]), ("rows of a group", BACKENDS[1]), ("dense", "triton")]
    + [pytest.param(kind, name, marks=long) for kind in KINDS for name in BACKENDS],
)
def test_opcheck(kind: str, backend: str) -> None:
    of, dtype = "dense" if "frozen" in kind else kind, torch.bfloat16 if kind == "nf4" else torch.float32
    cases, options = make_call(of, dtype, (), 16, 8, 3)
    if "dropout" in options:
        options["seeds"] = torch.arange(7, 7 + len(cases))
    calls.opcheck(backend, *cases, frozen=kind.removeprefix("frozen ") if "frozen" in kind else "", **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "dropout"])
def test_backward_keeps_u_and_never_x(composed: bool, kind: str, dtype: torch.dtype) -> None:
    """Dropout saves a seed and no mask, a quantized W nothing dense, and rows their index."""
    cases, options = make_call(kind, dtype, (80,), 96, 64, 8)
    stored = [t for case in cases for t in getattr(case.weight, "tensors", [case.weight]) if t is not None]
    x = cases[0].x.clone().requires_grad_(True) * 1.0
    with saved_for_backward((*stored, *(t for case in cases for t in (case.a, case.core, case.b)))) as kept:
        outputs(cases, x, [case.core.requires_grad_(True) for case in cases], **options)
    composes = composed and not cpp.serves(dtype) and kind in PRODUCTS
    core = 8 * 8 * dtype.itemsize if composes else 0  # s·R in x's dtype, which dx needs
    other = 8 * len(INDEX) if "index" in options else 8 if kind == "dropout" else 0
    assert sum(tensor.nbytes for tensor in kept) == len(cases) * (len(INDEX) * 80 * 8 * dtype.itemsize + core) + other


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bitwise_repeatable(composed: bool, dtype: torch.dtype) -> None:
    case = reference.make_case((33,), 96, 80, 16, dtype)
    first = run(case)
    for _ in range(249):
        tolerances.check_equal(run(case), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 9, 70])
def test_what_is_not_finite_stays_in_its_row_or_column(kernel: str, rows: int, dtype: torch.dtype) -> None:
    case = reference.make_case((rows,), 45, 37, 5, dtype)
    want, others = run(case)[0], [i for i in range(rows) if i != 2]
    x, weight = case.x.clone(), case.weight.clone()
    x[2, 44] = weight[36, 44] = float("nan")
    y = run(case, x=x)[0]
    assert not torch.isfinite(y[2]).any()
    assert torch.equal(y[others], want[others])
    y = run(replace(case, weight=weight))[0]
    assert not torch.isfinite(y[:, 36]).any()
    assert torch.equal(y[:, :36], want[:, :36])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_linears_own_and_keeps_r_in_fp32(composed: bool, kind: str) -> None:
    """Equal to the same call in bf16 bit for bit; the backward also runs under autocast, as in some training loops."""
    cases, options = make_call(kind, torch.float32)

    def half(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) else value

    narrow = [replace(case, **{n: half(v) for n, v in vars(case).items() if n != "core"}) for case in cases]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(*(replace(case, dy=half(case.dy)) for case in cases), **options)
    for got, want in zip(found, run(*narrow, **options), strict=True):
        assert torch.equal(got, want.to(got.dtype))
    count = len(cases)
    assert [one.dtype for one in found] == [torch.bfloat16] * count + [torch.float32] * (1 + count)


def with_compiled(cases: list[reference.Case], dynamic: bool, **options: Any) -> list[Callable[..., Tensor]]:
    """A function of x, the cores and an index that returns the y_j in one tensor, and the same function compiled."""

    def function(x: Tensor, cores: list[Tensor], index: Tensor | None) -> Tensor:
        return torch.cat(outputs(cases, x, cores, index=index, **options), -1).relu()

    torch._dynamo.reset()
    return [function, torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")]


@pytest.mark.parametrize(
    ("kind", "dynamic", "row_counts", "without_gradients"),
    [
        ("dense", True, (7, 5), False),
        ("rows", True, (7,), True),
        ("dropout", False, (7,), False),
        ("nf4", False, (7,), True),
        ("rows of a group", False, (7,), False),
    ]
    + [pytest.param(kind, one, (7, 5), True, marks=long) for kind in (*KINDS, "dropout") for one in (False, True)],
)
def test_compiles_without_a_graph_break(
    kind: str, dynamic: bool, row_counts: tuple[int, ...], without_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "group" in kind:  # dx of the op is one sum over the members
        monkeypatch.setattr(by_torch, "SMALL_BYTES", 0)
    cases, options = make_call(kind, torch.float32, (2,), 64, 32, 4)
    index = options.pop("index", None)
    functions = with_compiled(cases, dynamic, **options)
    cores = [case.core.requires_grad_(True) for case in cases]
    for count in row_counts:
        x = cases[0].x[:count].clone().requires_grad_(True)
        given_ = x, cores, None if index is None else torch.tensor(index[:count])
        results = []
        for call in functions:
            torch.manual_seed(1)
            y = call(*given_)
            results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, *cores))])
            if without_gradients:
                with torch.no_grad():
                    results[-1].append(call(*given_))
        tolerances.check_equal(*results)


@pytest.mark.parametrize(("kind", "dynamic"), [("rows", True), ("rows of a group", False)])
def test_a_compiled_call_checks_its_index(kind: str, dynamic: bool) -> None:
    cases, _ = make_call(kind, torch.float32)
    _, compiled = with_compiled(cases, dynamic)
    given_, index = (cases[0].x, [case.core.requires_grad_(True) for case in cases]), torch.tensor(INDEX)
    compiled(*given_, index)
    with pytest.raises(IndexError, match=r"expected index in \[-1, 3\).*got 3"):
        compiled(*given_, index + 1)


def test_dropout_is_an_unbiased_mask_on_the_adapter_alone(composed: bool) -> None:
    case = reference.make_case((2000,), 16, 8, 4, torch.float32, bias=False)
    case.x = torch.ones_like(case.x)
    torch.manual_seed(0)
    y = lora_sb_linear(case.x, case.weight, case.a, case.core, case.b, scaling=case.scaling, dropout=0.25)
    base = case.x @ case.weight.t()
    without = reference.forward(case) - base
    with_dropout = y - base
    assert with_dropout.std(0).min() > 0
    standard_error = with_dropout.std(0) / 2000**0.5
    assert ((with_dropout.mean(0) - without[0]).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_groups_masks_are_those_of_separate_calls(backend: str, dtype: torch.dtype) -> None:
    cases, _ = make_call("group", dtype)
    together = run(*cases, backend=backend, dropout=0.4, seed=5)
    torch.manual_seed(5)
    ys, dxs, dcores = zip(*(run(case, backend=backend, dropout=0.4) for case in cases), strict=True)
    tolerances.check_equal(together, (*ys, dxs[0] + dxs[1] + dxs[2], *dcores))


Change = Callable[[reference.Case], dict[str, Any]]
DROPOUT = r"expected dropout in \[0, 1\)"
EACH = "expected one of each argument for every member"
OF_ROWS = "an index for each of the rows"
BAD_INPUT: dict[str, tuple[str, Change, type[Exception], str]] = {
    "features": ("dense", lambda c: {"x": c.x[..., :-1]}, ValueError, r"expected x \[\.\.\., 8\].*got \[7, 2, 7\]"),
    "scalar": ("dense", lambda c: {"x": c.x[0, 0, 0]}, ValueError, r"expected x"),
    "weight": ("dense", lambda c: {"weight": c.weight.t()}, ValueError, r"expected weight \[6, 8\], got \[8, 6\]"),
    "bias": ("dense", lambda c: {"bias": c.bias[:2]}, ValueError, r"expected bias \[6\], got \[2\]"),
    "rank": ("dense", lambda c: {"lora_R": c.core[:2, :2]}, ValueError, "ranks differ"),
    "dims": ("dense", lambda c: {"lora_A": c.a[0]}, ValueError, r"expected lora_A \[r, in\]"),
    "r over 256": (
        "dense",
        lambda c: {"lora_A": torch.zeros(257, 8), "lora_R": torch.zeros(257, 257), "lora_B": torch.zeros(6, 257)},
        ValueError,
        r"r <= 256",
    ),
    "dtype of W": ("dense", lambda c: {"weight": c.weight.half()}, TypeError, "expected weight in x's dtype torch.float32"),
    "dtype of A": ("dense", lambda c: {"lora_A": c.a.bfloat16()}, TypeError, "expected lora_A in x's dtype"),
    "integer x": ("dense", lambda c: {"x": c.x.long()}, TypeError, "expected x in fp64, fp32, bf16"),
    "8-bit R": ("dense", lambda c: {"lora_R": c.core.to(torch.float8_e4m3fn)}, TypeError, "expected lora_R in fp32"),
    "integer R": ("dense", lambda c: {"lora_R": c.core.long()}, TypeError, "expected lora_R in fp32"),
    "device": ("dense", lambda c: {"lora_B": c.b.to("meta")}, ValueError, "expected lora_B on x's device cpu, got meta"),
    **{f"dropout {p}": ("dense", lambda c, p=p: {"dropout": p}, ValueError, DROPOUT) for p in (1.0, 1.5, -0.1, float("nan"))},
    "no weights": ("group", lambda c: {"weights": []}, ValueError, EACH),
    "no W in a group": ("group", lambda c: {"weights": [c.weight, None, None]}, TypeError, r"dense weights .* got NoneType"),
    "4 bits in a group": ("group", lambda c: {"weights": [storages.storage(6, 8)] * 3}, TypeError, "got QuantizedWeight"),
    "members": ("group", lambda c: {"lora_A": [], "lora_R": [], "lora_B": []}, ValueError, EACH),
    "ranks": ("group", lambda c: {"lora_A": [c.a[:2], c.a, c.a]}, ValueError, r"expected one rank for all members, got \[2, 3, 3\]"),
    "above": ("rows", lambda c: {"index": [0, 3, *INDEX[2:]]}, IndexError, r"expected index in \[-1, 3\), .* got 3"),
    "below": ("rows", lambda c: {"index": [0, -2, *INDEX[2:]]}, IndexError, r"got -2"),
    "length": ("rows", lambda c: {"index": [0, 1]}, ValueError, rf"{OF_ROWS} of x .* got 2 for \[7, 2, 8\]"),
    "dtype": ("rows", lambda c: {"index": torch.zeros(7)}, TypeError, r"expected index \[n\] in int64 on the CPU"),
    "fractions": ("rows", lambda c: {"index": [0.7] * 7}, TypeError, "expected index as integers"),
    "a mask": ("rows", lambda c: {"index": [True] * 7}, TypeError, "expected index as integers"),
    "one core": ("rows", lambda c: {"lora_R": c.core[0]}, ValueError, r"expected lora_R \[K, r, r\] with an index of rows"),
    "rank of a stack": ("rows", lambda c: {"lora_R": torch.zeros(3, 4, 4)}, ValueError, "ranks differ"),
    "dropout of rows": ("rows", lambda c: {"dropout": 0.5}, ValueError, "expected dropout 0 with an index of rows"),
    "a row": ("rows", lambda c: {"x": torch.zeros(8)}, ValueError, OF_ROWS),
    "above in a group": ("rows of a group", lambda c: {"index": [3] * 7}, IndexError, r"expected index in \[-1, 3\), .* got 3"),
    "inference mode": ("dense", lambda c: {"x": c.x.requires_grad_()}, ValueError, r"under torch\.inference_mode"),
}  # fmt: skip


def test_the_largest_rank_is_taken() -> None:
    cases, _ = make_call("dense", torch.float32, (2,), 256, 256, 256)
    check(run(*cases), *cases)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_alike_by_every_backend(name: str, backend: str) -> None:
    kind, change, error, message = BAD_INPUT[name]
    cases, options = make_call(kind, torch.float32, (2,), 8, 6, 3)
    fields = {"weight": "weight", "lora_A": "a", "lora_R": "core", "lora_B": "b", "bias": "bias"}
    if len(cases) == 1:
        call, given_ = lora_sb_linear, {name: getattr(cases[0], field) for name, field in fields.items()}
    else:
        plural = {"weight": "weights", "bias": "biases"}
        call = lora_sb_linear_group  # type: ignore[assignment]
        given_ = {plural.get(n, n): [getattr(c, field) for c in cases] for n, field in fields.items()}
    given_ |= {"x": cases[0].x, **options, **change(cases[0])}
    with lorasb.backend(backend), torch.inference_mode(name == "inference mode"), pytest.raises(error, match=message):
        call(**given_)


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
        elif dtype == torch.float32:  # torch's own products sum in an order that depends on strides
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
    """A bank stores the R's of all layers of an adapter contiguously, so the stack of one layer has gaps."""
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


@pytest.mark.parametrize("kind", MASKED)
def test_with_dropout_a_table_of_products_is_a_backend(kind: str) -> None:
    cases, options = make_call(kind, torch.float32)
    operands = operands_of(*cases, **options, seeds=torch.arange(7, 7 + len(cases)))
    x, dys = cases[0].x, [case.dy for case in cases]
    found, want = (by_torch.forward(table, x, operands) for table in (NAIVE, by_torch.EAGER))
    us = want[len(cases) :]
    found += by_torch.backward(NAIVE, dys, us, operands, True, True)
    want = [*want, *by_torch.eager_backward(dys, us, operands, True, True)]
    assert len(found) == len(want) == 3 * len(cases) + 1
    tolerances.check(found, want, tolerances.fp32(200))
