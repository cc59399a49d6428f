"""The fused kernels under Triton's interpreter, through `lorasb.backend("triton")`: values, gradients, launches."""

import mmap
from dataclasses import replace

import environment
import numpy as np
import pytest
import reference
import tolerances
import torch
from calls import check, few_of
from calls import run_kernels as run
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, checked, group_cases, planned

import lorasb
from lorasb.functional import lora_sb_linear
from lorasb.kernels import extended_gemm, operands, plan
from lorasb.kernels import linear as fused
from lorasb.kernels.block_sizes import GemmConfig, PrepConfig, gemm_splits, prep_members, prep_splits, rank_blocks
from lorasb.kernels.launcher import observed

FEATURES = {1: (59, 123), 3: (123, 59), 16: (59, 123), 17: (123, 59), 64: (123, 200), 96: (256, 123), 128: (160, 256)}
FEATURES[160] = (200, 163)  # beyond MAX_HELD_RANKS


@pytest.mark.parametrize(
    ("M", "r", "dtype"),
    [(M, r, torch.float32) for M, r in (*((63, r) for r in FEATURES), (1, 17), (16, 64), (130, 96), (130, 3))]
    + [(M, r, dtype) for M, r in ((63, 17), (63, 96), (1, 17), (130, 3)) for dtype in DTYPES[1:]]
    + [pytest.param(M, r, t, marks=pytest.mark.long) for M in (1, 16, 63, 130) for r in FEATURES for t in DTYPES],
)
def test_matches_reference(M: int, r: int, dtype: torch.dtype) -> None:
    case = reference.make_case((M,), *FEATURES[r], r, dtype)
    launches = checked(case)
    assert [one.name for one in launches] == ["prep_forward", "extended_gemm", "prep_backward", "extended_gemm"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "n", "ms", "r"), [(70, 128, (128, 64, 64), 16), (40, 96, (100, 60), 24), (9, 64, (59, 70), 32)]
)
def test_groups_match_reference_in_four_launches(
    M: int, n: int, ms: tuple[int, ...], r: int, dtype: torch.dtype
) -> None:
    cases = group_cases(M, n, ms, r, dtype)
    launches = checked(*cases)
    assert len(launches) == 4


@pytest.mark.parametrize("names", [("a", "bias", "x"), ("dy", "weight", "core", "b")])
def test_tensors_that_torch_negates_lazily(names: tuple[str, ...]) -> None:
    """In memory they have the opposite sign, like the imaginary part of a conjugate."""
    case = reference.make_case((9,), 64, 48, 8, torch.float32)
    negated = {name: torch._neg_view(-getattr(case, name)).detach() for name in names}
    assert all(tensor.is_neg() for tensor in negated.values())
    results = run(replace(case, **negated), x=negated.get("x"))
    tolerances.check_equal(results, run(case))


def test_a_group_too_wide_for_one_pass_is_prepared_in_several() -> None:
    cases = group_cases(4, 150, (150, 152, 151), 150, torch.float32)
    assert prep_members(150, 3) == 2
    launches = checked(*cases)
    assert [one.name for one in launches].count("prep_forward") == 2


@settings(max_examples=8, deadline=None)
@given(
    M=st.integers(1, 80),
    n=st.integers(1, 90),
    ms=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    rank=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(M: int, n: int, ms: list[int], rank: int, bias: bool, dtype: torch.dtype) -> None:
    cases = group_cases(M, n, tuple(ms), min(rank, n, *ms), dtype, bias)
    results = run(*cases)
    if dtype == torch.float32:
        check(results, *cases)
    for got, plain in zip(results, run(*cases, backend="eager"), strict=True):
        bound = tolerances.fp32(n + sum(ms) + 3 * rank) if dtype == torch.float32 else few_of(dtype)
        tolerances.check(got, plain, bound)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5), (0,), (2, 0, 3)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    case = reference.make_case(shape, 24, 20, 4, torch.float32)
    results = run(case)
    assert [tuple(one.shape) for one in results[:2]] == [(*shape, 20), (*shape, 24)]
    check(results, case)


@pytest.mark.parametrize("path", ["fused", "addmm"])
@pytest.mark.parametrize("layout", ["x and dy", "weight", "factors"])
def test_non_contiguous(layout: str, path: str) -> None:
    case = reference.make_case((6, 4), 24, 20, 4, torch.float32)
    x = case.x
    if layout == "x and dy":
        wide = torch.randn(4, 6, 48)
        wide[..., ::2] = case.x.transpose(0, 1)
        x = wide[..., ::2].transpose(0, 1).detach()
        case.dy = case.dy.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "weight":  # as transformers' Conv1D stores it
        case.weight = case.weight.t().contiguous().t()
    else:
        case.a, case.b = case.a.t().contiguous().t(), case.b.t().contiguous().t()
    with planned(path=path):
        check(run(case, x=x.clone(memory_format=torch.preserve_format)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_path_through_addmm(dtype: torch.dtype) -> None:
    with planned(path="addmm"):
        for cases in (group_cases(40, 96, (100, 60), 24, dtype), [reference.make_case((40,), 64, 96, 16, dtype)]):
            checked(*cases)


def blocks(config: PrepConfig | GemmConfig) -> PrepConfig | GemmConfig:
    """Return a configuration as the interpreter sees it: without warps and stages."""
    if environment.PTX:
        return config
    return replace(config, warps=4, stages=1, registers=None)


SHIPPED = {
    blocks(config)
    for path in sorted(plan.TABLES.glob("sm_*.json"))
    for rule in plan.read_rules(path)
    for config in (rule.prep, rule.gemm)
    if config
}


PREPS, GEMMS = (sorted((one for one in SHIPPED if isinstance(one, kind)), key=str) for kind in (PrepConfig, GemmConfig))


@pytest.mark.parametrize("i", range(max(len(PREPS), len(GEMMS))))
def test_every_shipped_configuration(i: int) -> None:
    case = reference.make_case((40,), 150, 70, 24, torch.float32)
    with planned(path="fused", prep=PREPS[i % len(PREPS)], gemm=GEMMS[i % len(GEMMS)]):
        checked(case)


def test_the_adapter_alone() -> None:
    case = replace(reference.make_case((21,), 64, 48, 8, torch.float32, bias=False), weight=None)
    launches = checked(case)
    assert len(launches) == 4


@pytest.mark.parametrize(("need_x", "need_core"), [(True, False), (False, True)])
def test_only_what_is_needed(need_x: bool, need_core: bool) -> None:
    case = reference.make_case((40,), 64, 48, 8, torch.float32)
    x, core = case.x.requires_grad_(need_x), case.core.requires_grad_(need_core)
    with lorasb.backend("triton"), observed() as launches:
        lora_sb_linear(x, case.weight, case.a, core, case.b, case.bias, case.scaling).backward(case.dy)
    want_dx, want_dcore = reference.gradients(case.double())
    assert (x.grad is None) is not need_x
    assert (core.grad is None) is not need_core
    tolerances.check(x.grad if need_x else core.grad, want_dx if need_x else want_dcore, tolerances.fp32(64))
    assert len(launches) == 4
    assert launches[3].grid == (1 if need_core else 0) + (1 if need_x else 0)


def test_a_member_whose_output_nobody_used() -> None:
    cases = group_cases(20, 32, (24, 16, 16), 4, torch.float32)
    y, _, _, dx, dcore, *unused = run(*cases, used=(0,))
    check((y, dx, dcore), cases[0])
    assert unused == [None, None]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy warns in the interpreter
@pytest.mark.parametrize("rows", [9, 40])
def test_rows_do_not_leak(rows: int) -> None:
    case = reference.make_case((rows,), 50, 24, 5, torch.float32)
    want = run(case)
    case.x[4, 3] = case.dy[6, 2] = float("nan")
    got = run(case)
    others = [i for i in range(rows) if i not in (4, 6)]
    assert not torch.isfinite(got[0][4]).any()
    assert not torch.isfinite(got[1][6]).any()
    for result, clean in zip(got[:2], want[:2], strict=True):
        assert torch.equal(result[others], clean[others])
    assert torch.equal(got[0][6], want[0][6])
    assert torch.equal(got[1][4], want[1][4])


def test_many_rows_reduce_dR_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extended_gemm, "CORE_CHUNK", 64)
    case = reference.make_case((150,), 64, 48, 40, torch.float32)
    launches = checked(case)
    assert launches[3].arguments["core_chunks"] == 3


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "INT32_LIMIT", 100)
    cases = group_cases(40, 96, (64, 48), 16, torch.float32)
    launches = checked(*cases)
    assert all(one.arguments["WIDE"] for one in launches)


@given(r=st.integers(1, 256))
def test_ranks_are_covered_with_little_padding(r: int) -> None:
    parts = rank_blocks(r)
    assert r <= sum(parts) < max(1.5 * r, r + 16)
    assert all(part & (part - 1) == 0 for part in parts)
    assert rank_blocks(96) == (64, 32)


@given(blocks=st.integers(1, 500), steps=st.integers(1, 500))
def test_splits_leave_no_program_without_work(blocks: int, steps: int) -> None:
    for splits in (prep_splits(blocks, steps), gemm_splits(blocks, steps, 16), gemm_splits(blocks, steps, 512)):
        assert 1 <= splits <= steps


@pytest.mark.parametrize("dtype", [torch.float64, *(() if environment.PTX else (torch.bfloat16,))], ids=str)
def test_dtypes_without_a_kernel_are_refused(dtype: torch.dtype) -> None:
    case = reference.make_case((3,), 8, 6, 3, dtype)
    with lorasb.backend("triton"), pytest.raises(TypeError, match=r"expected x in fp32, bf16 or fp16|raw bits of bf16"):
        lora_sb_linear(case.x, case.weight, case.a, case.core, case.b)


@pytest.mark.parametrize("count", [1, 2])
def test_a_bias_with_gaps_and_a_scaling_of_numpys(count: int) -> None:
    cases = group_cases(20, 64, (48, 32)[:count], 8, torch.float32)
    for case in cases:
        case.bias = torch.stack([case.bias, torch.full_like(case.bias, 99.0)], 1)[:, 0]
        case.scaling = np.float32(0.5)  # type: ignore[assignment]
    results = run(*cases)
    for case in cases:
        case.scaling = 0.5
    check(results, *cases)


@pytest.mark.skipif(bool(environment.PTX), reason="6 GB of addresses are too many to execute compiled code on")
def test_rows_of_w_beyond_2_to_the_31_elements() -> None:
    """dx with a W whose rows are 2^26 elements apart: 6 GB of addresses, of which only a few pages are touched."""
    K, N, r, M, stride = 48, 32, 16, 20, 1 << 26
    memory = torch.frombuffer(mmap.mmap(-1, 2 * K * stride), dtype=torch.float16)
    weight = memory.as_strided((K, N), (stride, 1))
    case = reference.make_case((M,), N, K, r, torch.float16, bias=False, scaling=1.0)
    weight.copy_(case.weight)
    chosen = plan.LaunchPlan("fused", PrepConfig(32, 16, 4, 2), GemmConfig(32, 32, 16, 1, 4, 2))
    members = fused.Members([weight], [case.a], [case.core], [case.b], [None], [1.0])
    u = torch.zeros(M, r, dtype=torch.float16)
    dx, _ = fused.backward([case.dy], members, [u], chosen, True, False)
    want, _ = reference.gradients(case.double())
    tolerances.check_half(dx, reference.plain_chain(case)[1], want)
