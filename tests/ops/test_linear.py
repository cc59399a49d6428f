"""The op against an independent fp64 reference: values, gradients, memory, determinism, tracing, bad input."""

from __future__ import annotations

import pytest
import reference
import tolerances
import torch
from calls import opcheck, operands_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("composed")


def check_fp32(case: reference.Case) -> None:
    exact = case.double()
    wanted = (reference.forward(exact), *reference.gradients(exact))
    r = case.a.shape[0]
    lengths = (case.x.shape[-1] + r, case.dy.shape[-1] + r, case.x[..., 0].numel())
    for result, want, length in zip(run(case), wanted, lengths, strict=True):
        tolerances.check(result, want, tolerances.fp32(max(1, length)))


def check_half(rows: int, n: int, m: int, r: int, dtype: torch.dtype) -> None:
    """y and dx against the plain chain, and dR where it has enough elements (small ones: the test after this)."""
    seeds = -(-tolerances.POOL // (rows * min(n, m)))
    pools = half_results([reference.make_case((rows,), n, m, r, dtype, seed=seed) for seed in range(seeds)])
    for pool in pools if r * r * seeds >= tolerances.POOL else pools[:2]:
        tolerances.check_half(*pool)


def half_results(cases: list[reference.Case]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each of y, dx, dR: ours, the plain chain's and the exact one, pooled over cases."""
    found: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for case in cases:
        exact = case.double()
        wanted = (reference.forward(exact), *reference.gradients(exact))
        for pool, *values in zip(found, run(case), reference.plain_chain(case), wanted, strict=True):
            pool.append(tuple(value.reshape(-1) for value in values))
    return [tuple(torch.cat(part) for part in zip(*pool, strict=True)) for pool in found]


def check_against_reference(rows: int, n: int, m: int, r: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        check_fp32(reference.make_case((rows,), n, m, r, dtype))
    else:
        check_half(rows, n, m, r, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 3, 16, 17, 59])
@pytest.mark.parametrize("m", [0, 1, 63, 1023])
def test_matches_reference(m: int, r: int, dtype: torch.dtype) -> None:
    if m == 0:
        case = reference.make_case((0,), 123, 59, r, dtype)
        y, dx, dcore = run(case)
        assert y.shape == (0, 59)
        assert dx.shape == (0, 123)
        assert not dcore.any()
    else:
        check_against_reference(m, 123, 59, r, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [64, 96, 128])
def test_matches_reference_at_real_sizes(r: int, dtype: torch.dtype) -> None:
    check_against_reference(63, 4096, 1024, r, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("r", [1, 3])
def test_small_cores_in_16_bits(r: int, dtype: torch.dtype) -> None:
    cases = [reference.make_case((6,), 12, 10, r, dtype, seed=seed) for seed in range(-(-tolerances.POOL // (r * r)))]
    for pool in half_results(cases):
        tolerances.check_half(*pool)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5), (0,), (2, 0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    case = reference.make_case(shape, 24, 20, 4, torch.float32, bias=bias)
    y, dx, _ = run(case)
    assert y.shape == (*shape, 20)
    assert dx.shape == (*shape, 24)
    tolerances.check(y, reference.forward(case.double()), tolerances.fp32(28))
    tolerances.check(dx, reference.gradients(case.double())[0], tolerances.fp32(24))


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
    y, dx, dcore = run(case)
    want_dx, want_dcore = reference.gradients(case)
    for result, want in ((y, reference.forward(case)), (dx, want_dx), (dcore, want_dcore)):
        tolerances.check(result, want, tolerances.FP64)


def test_non_contiguous_x_and_dy() -> None:
    case = reference.make_case((6, 4), 24, 20, 4, torch.float32)
    want = run(case)
    wide = torch.randn(4, 6, 48)
    wide[..., ::2] = case.x.transpose(0, 1)
    x = wide[..., ::2].transpose(0, 1).detach()
    assert not x.is_contiguous()
    case.dy = case.dy.transpose(0, 1).contiguous().transpose(0, 1)
    for got, expected in zip(run(case, x), want, strict=True):
        tolerances.check(got, expected, tolerances.fp32(24))


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    case = reference.make_case((3, 2), 7, 6, 3, torch.float64, bias=bias)

    def function(x: Tensor, core: Tensor) -> Tensor:
        return lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling)

    assert torch.autograd.gradcheck(
        function, (case.x.requires_grad_(True), case.core.requires_grad_(True)), **tolerances.GRADCHECK
    )


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("variant", ["plain", "no bias", "no weight", "frozen R", "frozen x", "dropout"])
def test_opcheck(backend: str, variant: str) -> None:
    case = reference.make_case((2, 3), 8, 6, 3, torch.float32, bias=variant != "no bias")
    case.x.requires_grad_(variant != "frozen x")
    case.core.requires_grad_(variant != "frozen R")
    dropout, seed = (0.5, torch.tensor([7])) if variant == "dropout" else (0.0, None)
    opcheck(backend, operands_of(case, base=() if variant == "no weight" else None, dropout=dropout, seeds=seed), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_u_and_never_x(dtype: torch.dtype, composed: bool) -> None:
    case = reference.make_case((32, 16), 200, 150, 8, dtype)
    parameters = {t.data_ptr() for t in (case.weight, case.a, case.core, case.b)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = case.x.clone().requires_grad_(True) * 1.0
    core = case.core.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias)
    rounds = composed and dtype == torch.bfloat16 and not cpp.serves(dtype)
    rounded_core = 8 * 8 * 2 if rounds else 0  # R in x's dtype, which dx needs
    assert sum(kept.values()) == 32 * 16 * 8 * case.x.element_size() + rounded_core


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(dtype: torch.dtype) -> None:
    case = reference.make_case((33,), 96, 80, 16, dtype)
    first = run(case)
    for _ in range(249):
        for got, want in zip(run(case), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_do_not_leak(value: float) -> None:
    case = reference.make_case((9,), 32, 24, 4, torch.float32)
    want = run(case)[0]
    case.x[4, 3] = value
    got = run(case)[0]
    assert not torch.isfinite(got[4]).all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(got[others], want[others])


def test_autocast_follows_linear_and_keeps_r_in_fp32() -> None:
    case = reference.make_case((6,), 24, 20, 4, torch.float32)
    seen = []
    x, core = case.x.requires_grad_(True), case.core.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling)
        plain = torch.nn.functional.linear(case.x, case.weight, case.bias)
        (y.float() * case.dy).sum().backward()  # backward under autocast, as some loops have it
    seen.append(core.grad)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert core.grad is not None
    assert core.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    half = reference.make_case((6,), 24, 20, 4, torch.bfloat16)
    want = run(half)
    assert torch.equal(y, want[0])
    assert torch.equal(core.grad, want[2])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_graph_break(dynamic: bool, dropout: float) -> None:
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    torch._dynamo.reset()

    def function(x: Tensor, core: Tensor) -> Tensor:
        y = lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling, dropout=dropout)
        return torch.relu(y)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 7):
        x = torch.randn(rows, 24, requires_grad=True)
        core = case.core.clone().requires_grad_(True)
        results = []
        for call in (function, compiled):
            torch.manual_seed(1)
            x.grad = core.grad = None
            y = call(x, core)
            y.sum().backward()
            results.append((y.detach(), x.grad, core.grad))
        for plain, traced in zip(*results, strict=True):
            assert torch.equal(plain, traced)


BAD_INPUT = {
    "features": (lambda c: {"x": c.x[:, :-1]}, ValueError, r"expected x \[\.\.\., 8\].*got \[3, 7\]"),
    "scalar": (lambda c: {"x": c.x[0, 0]}, ValueError, r"expected x"),
    "weight": (lambda c: {"weight": c.weight.t()}, ValueError, r"expected weight \[6, 8\], got \[8, 6\]"),
    "bias": (lambda c: {"bias": c.bias[:2]}, ValueError, r"expected bias \[6\], got \[2\]"),
    "rank": (lambda c: {"lora_R": c.core[:2, :2]}, ValueError, r"ranks differ"),
    "dims": (lambda c: {"lora_A": c.a[0]}, ValueError, r"expected lora_A \[r, in\]"),
    "r over 256": (
        lambda c: {"lora_A": torch.zeros(257, 8), "lora_R": torch.zeros(257, 257), "lora_B": torch.zeros(6, 257)},
        ValueError,
        r"r <= 256",
    ),
    "dtype of W": (lambda c: {"weight": c.weight.half()}, TypeError, r"expected weight in x's dtype torch.float32"),
    "dtype of A": (lambda c: {"lora_A": c.a.bfloat16()}, TypeError, r"expected lora_A in x's dtype"),
    "integer x": (lambda c: {"x": torch.ones(3, 8, dtype=torch.long)}, TypeError, r"expected x in fp64, fp32, bf16"),
    "integer R": (lambda c: {"lora_R": torch.ones(3, 3, dtype=torch.long)}, TypeError, r"expected lora_R in fp32"),
    "device": (lambda c: {"lora_B": c.b.to("meta")}, ValueError, r"expected lora_B on x's device cpu, got meta"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    change, kind, message = BAD_INPUT[name]
    c = reference.make_case((3,), 8, 6, 3, torch.float32)
    given_ = {"x": c.x, "weight": c.weight, "lora_A": c.a, "lora_R": c.core, "lora_B": c.b, "bias": c.bias}
    with pytest.raises(kind, match=message):
        lora_sb_linear(**{**given_, **change(c)})
