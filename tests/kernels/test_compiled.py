"""Compiled kernels of every kind, executed at small sizes: what `make test` runs of `pytest --ptx ARCH` (sm_86, sm_90).

Prepared launches of the adapted linear give the same bits as ordinary ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import environment
import pytest
import reference
import torch
from calls import check, dense, exact, outputs, run_kernels
from kernel_cases import INDEX, check_follows_mask, checked, group_cases, planned, row_cases
from reference import make_case
from storages import bits_of, quantized_case, storage
from storages import exact as dequantized
from tolerances import BF16_FEW, HALF_FEW, check_equal, check_half, check_scaled, fp32
from tolerances import check as close
from torch import Tensor

import lorasb
from benchmarks.kernels.ptx.plugin import Executor
from lorasb.backends import autotune
from lorasb.backends import triton as fused
from lorasb.functional import dequantize
from lorasb.kernels import linear, plan, prepared_launch, prepared_linear
from lorasb.kernels.launcher import observed
from lorasb.ops.registry import backend_op, unpack_words

pytestmark = pytest.mark.skipif(not environment.PTX, reason="executes compiled kernels: pytest --ptx sm_86")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "decode": (3, 128, 80, 16),
    "aligned": (64, 128, 128, 64),
    "ragged, two blocks of rows": (70, 100, 130, 24),
    "long reduction": (20, 1024, 64, 16),
    "ranks read in blocks": (20, 160, 144, 144),
}


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    prepared_linear.forget()
    yield
    prepared_linear.forget()


def kinds() -> int:
    """Return the number of kinds of calls that are prepared."""
    return len(prepared_linear._forwards) + len(prepared_linear._backwards)


def same_bits(call: Callable[[], Any], patch: pytest.MonkeyPatch) -> Any:
    """Return a call's results; prepared launches and a repetition have to give the bits of ordinary ones."""
    prepared_linear.forget()
    torch.manual_seed(3)
    with observed():  # observed launches are ordinary ones
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


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    M, n, m, r = SHAPES[shape]
    case = make_case((M,), n, m, r, dtype)
    check(same_bits(lambda: run_kernels(case), monkeypatch), case)
    if shape == next(iter(SHAPES)):
        others = make_case((M,), n, m, r, dtype, seed=9)
        check(run_kernels(others), others)  # repeats the prepared launches with other tensors
    assert kinds() == 2  # one forward, one backward


@pytest.mark.parametrize(
    ("tokens", "n", "ms", "r"),
    [(1, 160, (144,), 16), (19, 160, (144,), 40), (3, 160, (144,), 144), (3, 96, (80, 48), 24)],
)
def test_rows_with_an_r_each(tokens: int, n: int, ms: tuple[int, ...], r: int) -> None:
    cases = row_cases(tokens, n, ms, r, BF16)
    check_scaled(run_kernels(*cases, index=INDEX), exact(*cases, index=INDEX), BF16_FEW)


def test_the_order_of_programs_does_not_matter(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split sums in as many orders as there are programs, so that each comes last once. The executor compares bits."""
    monkeypatch.setattr(executor, "every_last", True)
    case = make_case((5,), 512, 48, 16, BF16)
    launches = checked(case)
    assert max(one.arguments["splits"] for one in launches) > 1
    assert all(not one.arguments["counters"].any() for one in launches if one.arguments["splits"] > 1)


def test_dropout_follows_its_mask() -> None:
    check_follows_mask(make_case((24,), 64, 48, 8, BF16, bias=False), 0.4, HALF_FEW)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "way"), [(5, "inline"), (40, "scratch")])
def test_4_bits_inline_and_by_a_scratch(rows: int, way: str, nested: bool) -> None:
    """A GEMM that dequantizes inline, or a scratch tensor that is filled in the launch of the thin products."""
    case = replace(make_case((rows,), 64, 48, 16, BF16), weight=storage(48, 64, "nf4", 64, nested))
    with planned(weights=way), observed() as launches:
        found = run_kernels(case)
    assert ("quantized_gemm" in {one.name for one in launches}) == (way == "inline")
    check_scaled(found, reference.by_formulas(dense(case).double()), HALF_FEW)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantization_is_exact(kind: str) -> None:
    weight = storage(33, 62, kind, 32, True, FP32)
    with lorasb.backend("triton"):
        assert torch.equal(bits_of(dequantize(weight, BF16)), bits_of(dequantized(weight, BF16)))


def test_gradient_signs() -> None:
    g = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(70, features, generator=g).bfloat16() for features in (65, 130))
    total = torch.randn(65, 130, generator=g)
    before = total.double()
    words, nonzero, _ = backend_op("gradient_signs", "triton")(dy, x, total, False)
    want = before + dy.double().t() @ x.double()
    close(total, want, fp32(71))
    found = unpack_words(words, 130, -1.0, 1.0, FP32) * unpack_words(nonzero, 130, 0.0, 1.0, FP32)
    assert torch.equal(found, torch.sign(total))


def test_the_core_is_not_cut_to_tf32() -> None:
    """For a 16-bit x, v = u Rᵀ is as close to fp64 as an fp32 product is: the tensor cores take R in two parts."""
    M, r = 64, 64
    case = make_case((M,), 64, 64, r, FP16, bias=False)
    eye = torch.eye(64, dtype=FP16)
    members = linear.Members([None], [eye], [case.core], [eye], [None], [1.0])
    chosen = plan.choose(plan.Shape("forward", "fp16", M, 64, 64, r), environment.PTX, 1)
    (y,), (u,) = linear.forward(case.x, members, chosen, linear.Mask())
    assert torch.equal(u, case.x)
    want = case.x.double() @ case.core.double().t()
    plain = (case.x.float() @ case.core.t()).half()
    check_half(y, plain, want)
    bias = float((y.double() * want).sum() / want.square().sum()) - 1.0
    assert abs(bias) < abs(float((plain.double() * want).sum() / want.square().sum()) - 1.0) + 2e-5


CALLS = {
    "group without padding": group_cases(20, 96, (80, 64, 72), 64, BF16),
    "dimensions": [make_case((2, 3, 4), 64, 48, 8, BF16)],
    "group": group_cases(20, 96, (80, 64, 72), 24, BF16),  # with cuBLAS, ranks are padded
    "group in fp16": group_cases(20, 64, (48, 32, 40), 24, FP16),
    "no W": [replace(make_case((20,), 64, 48, 8, BF16, bias=False), weight=None)],
}


DROPPED = [("dimensions", "addmm"), ("group", "addmm"), ("group", "fused"), ("no W", "fused")]


@pytest.mark.parametrize(
    ("kind", "path"), [*((kind, "addmm") for kind in list(CALLS)[:3]), *((kind, "fused") for kind in list(CALLS)[1:])]
)
def test_kinds_of_calls(kind: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = CALLS[kind]
    with planned(path=path):
        check(same_bits(lambda: run_kernels(*cases), monkeypatch), *cases)
        if (kind, path) in DROPPED:
            same_bits(lambda: run_kernels(*cases, dropout=0.4), monkeypatch)


def test_each_call_has_a_seed_of_its_own() -> None:
    case = make_case((2, 3, 4), 64, 48, 8, BF16)
    assert not torch.equal(*(run_kernels(case, dropout=0.4)[0] for _ in range(2)))


@pytest.mark.parametrize("needed", ["dx", "dR"])
def test_one_gradient_alone(needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((20,), 64, 48, 8, BF16)

    def call() -> list[Tensor]:
        x, core = case.x.clone().requires_grad_(needed == "dx"), case.core.clone().requires_grad_(needed == "dR")
        with lorasb.backend("triton"):
            (y,) = outputs([case], x, [core])
        return list(torch.autograd.grad(y, x if needed == "dx" else core, case.dy))

    same_bits(call, monkeypatch)


def test_what_cannot_be_repeated_is_launched_the_ordinary_way() -> None:
    case = make_case((20,), 64, 48, 8, BF16)
    wanted = run_kernels(case)
    shifted = torch.empty(20 * 64 + 1, dtype=BF16)[1:].view(20, 64).copy_(case.x)
    for x in (shifted, torch.empty(64, 20, dtype=BF16).t().copy_(case.x)):  # not aligned; rows not contiguous
        check_equal(run_kernels(case, x=x.detach()), wanted)
    turned = replace(case, core=case.core.t().contiguous().t())  # the kernels read a copy of it
    check(run_kernels(turned), turned)
    check(run_kernels(turned), turned)


def test_nothing_is_launched_before_all_pointers_are_known_to_be_aligned() -> None:
    """Only the launch after cuBLAS reads A: it adds dropout's masked term to dx."""
    case = make_case((20,), 64, 48, 8, BF16)
    shifted = torch.empty(8 * 64 + 1, dtype=BF16)[1:].view(8, 64).copy_(case.a)
    with planned(path="addmm"):
        check_equal(*(run_kernels(replace(case, a=a), dropout=0.3, seed=3) for a in (case.a, shifted)))


def test_a_gradient_that_is_one_number_is_no_matrix_of_rows() -> None:
    case = make_case((20,), 64, 48, 8, BF16)
    case.dy = torch.ones(()).to(BF16).expand(20, 48)
    check(run_kernels(case), case)


def test_new_tables_prepare_anew() -> None:
    case = make_case((20,), 64, 48, 8, BF16)
    run_kernels(case)
    before = kinds()
    plan.forget()
    run_kernels(case)
    assert kinds() == 2 * before


def test_a_kind_that_a_capture_met_first_is_prepared_and_checked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((20,), 64, 48, 8, BF16)
    monkeypatch.setattr(prepared_launch, "is_captured", lambda like: True)
    check(run_kernels(case), case)
    assert kinds() == 0
    monkeypatch.undo()
    check(run_kernels(case), case)
    assert kinds() == 2


def test_the_first_prepared_results_of_a_kind_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a kind's plan covers ordinary launches only. Wrong results are never returned."""
    checked: list[str] = []
    monkeypatch.setattr(fused, "_check_forward", lambda *given: checked.append("forward"))
    monkeypatch.setattr(fused, "_check_backward", lambda *given: checked.append("backward"))
    case = make_case((20,), 64, 48, 8, BF16)
    for _ in range(2):
        check(run_kernels(case), case)
    assert checked == ["forward", "backward"]

    def wrong(*given: object) -> None:
        raise autotune.WrongResultError("y differs from torch's")

    prepared_linear.forget()
    monkeypatch.setattr(fused, "_check_forward", wrong)
    for _ in range(2):
        with pytest.raises(autotune.WrongResultError):
            run_kernels(case)


def test_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_linear, "MOST_KINDS", 2)
    for M in (1, 2, 3):
        case = make_case((M,), 32, 32, 8, BF16)
        check(run_kernels(case), case)
        assert kinds() <= 2


def test_a_call_of_which_only_the_first_launch_can_be_prepared() -> None:
    """The launch that adds the masked term would need a copy of A."""
    case = make_case((20,), 64, 48, 8, FP32, bias=False)
    with planned(path="addmm"):
        check_follows_mask(replace(case, a=case.a.t().contiguous().t()), 0.5, fp32(64))


def test_few_tokens_overlap_the_thin_products() -> None:
    """From sm_90 on, but not over a weight that the thin products' launch dequantizes, and not with masks in dx."""
    overlap = int(environment.PTX[3:]) >= 90
    few, many = make_case((16,), 64, 48, 8, BF16), make_case((65,), 64, 48, 8, BF16)
    packed = quantized_case(storage(48, 64, dtype=BF16), 16, 8, BF16)

    def overlapping(case: reference.Case, dropout: float = 0.0) -> list[str]:
        with observed() as launches:
            run_kernels(case, dropout=dropout)
        return [one.name for one in launches if one.overlaps]

    assert overlapping(few) == ["extended_gemm"] * 2 * overlap
    assert overlapping(few, 0.5) == ["extended_gemm"] * overlap
    assert overlapping(packed) == ["quantized_gemm", "quantized_gemm", "extended_gemm"] * overlap
    with planned(weights="scratch"):
        assert overlapping(packed) == []
    assert overlapping(many) == []
