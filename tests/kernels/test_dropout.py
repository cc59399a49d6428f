"""Dropout in the kernels: the mask depends only on seed and position, and is the same in forward and backward."""

from dataclasses import replace

import pytest
import reference
import tolerances
import torch
from calls import operands_of
from calls import run_kernels as run
from kernel_cases import check_follows_mask, group_cases, mask_of, planned

from lorasb.backends import autotune, eager
from lorasb.backends import triton as backend
from lorasb.kernels import linear as launch
from lorasb.kernels.launcher import observed

LONG = pytest.mark.long


def test_gradients_follow_the_mask_of_the_forward() -> None:
    check_follows_mask(reference.make_case((40,), 70, 64, 8, torch.float32, bias=False), 0.4, tolerances.fp32(80))


def test_beside_cublas_the_masked_term_is_added_to_the_bases() -> None:
    case = reference.make_case((40,), 70, 64, 8, torch.float32)
    results = []
    for path in ("fused", "addmm"):
        with planned(path=path), observed() as launches:
            results.append(run(case, dropout=0.4, seed=5))
        assert [one.name for one in launches] == [
            "prep_forward",
            *["extended_gemm"] * (path == "fused"),  # in forward, cuBLAS needs no mask
            "prep_backward",
            "extended_gemm",
        ]
        assert launches[-1].arguments["ADD"] == (path == "addmm")
    tolerances.check(*results, tolerances.fp32(80))


def test_without_a_base_the_masked_term_is_all_there_is() -> None:
    case = reference.make_case((40,), 70, 64, 8, torch.float32, bias=False)
    with planned(path="addmm"):
        y, dx, dcore = run(case, dropout=0.4, seed=5)
        y_alone, dx_alone, dcore_alone = run(replace(case, weight=None), dropout=0.4, seed=5)
    tolerances.check(y_alone + case.x @ case.weight.t(), y.double(), tolerances.fp32(80))
    tolerances.check(dx_alone + case.dy @ case.weight, dx.double(), tolerances.fp32(80))
    assert torch.equal(dcore, dcore_alone)


@pytest.mark.parametrize(("path", "columns"), [("fused", 128), ("addmm", 64)])
def test_a_layer_alone_has_large_tiles_of_even_lengths(path: str, columns: int) -> None:
    case = reference.make_case((70,), 144, 64, 32, torch.float32, bias=False)
    with planned(path=path, gemm=autotune.GEMMS[0]), observed() as launches:
        check_follows_mask(case, 0.4, tolerances.fp32(150))
    (gemm,) = (one for one in launches if one.name == "extended_gemm" and one.arguments["BACKWARD"])
    blocks = [gemm.arguments[f"BLOCK_{side}"] for side in "MNK"]
    assert (blocks, gemm.config.warps) == ([64, columns, 32], 4)


@pytest.mark.parametrize(
    ("path", "r"),
    [("fused", 8), ("addmm", 16), *(pytest.param(*one, marks=LONG) for one in (("fused", 16), ("addmm", 8)))],
)
def test_members_of_a_group_have_the_masks_of_separate_calls(path: str, r: int) -> None:
    cases = group_cases(40, 70, (48, 32, 64), r, torch.float32)
    with planned(path=path):
        with observed() as launches:
            together = run(*cases, dropout=0.4, seed=5)
        torch.manual_seed(5)
        ys, dxs, dcores = zip(*(run(case, dropout=0.4) for case in cases), strict=True)
    assert len(launches) == (4 if path == "fused" else 3)
    for got, want in zip(together, (*ys, sum(dx.double() for dx in dxs), *dcores), strict=True):
        tolerances.check(got, want, tolerances.fp32(150 if want.dtype == torch.float64 else 80))


@pytest.mark.parametrize(
    ("n", "seed"), [(1, 2**40 + 1), (3, 0), (8, 1), (66, 2**31), (100, 2**63 - 2), (16, 0x1234_5678_9ABC_DEF0)]
)
def test_eager_torch_knows_the_mask(n: int, seed: int) -> None:
    case = reference.make_case((20,), n, 8, 4, torch.float32)
    for dropout in (1e-9, 0.05, 0.5, 0.95, 1 - 1e-9) if n == 66 else (0.5,):
        want = eager.philox_mask(case.x.shape, dropout, seed, case.x.device)
        assert torch.equal(mask_of(case, seed, dropout), want)


def test_no_rows_have_no_mask() -> None:
    assert eager.philox_mask(torch.Size((0, 12)), 0.3, 3, torch.device("cpu")).shape == (0, 12)


def test_the_words_are_philox() -> None:
    """Random123's known answer for counter 0 and key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    case = reference.make_case((1,), 8, 8, 4, torch.float32)
    halves = 0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00
    for threshold in (*halves, *(half + 1 for half in halves)):
        mask = mask_of(case, 0, threshold / 2**16)
        assert mask.tolist() == [[half >= threshold for half in halves]]


def test_elements_are_dropped_independently() -> None:
    """Among the eight columns of one counter, between adjacent counters, and between seeds."""
    shape = torch.Size((4000, 64))
    kept, other = (eager.philox_mask(shape, 0.3, seed, torch.device("cpu")).double() - 0.7 for seed in (3, 4))
    assert kept.mean().abs() < 5 * (0.21 / kept.numel()) ** 0.5
    assert (kept != other).double().mean() > 0.3
    products = kept.t() @ kept / (len(kept) * 0.21)
    assert (products - torch.eye(64)).abs().max() < 5.5 * len(kept) ** -0.5
    assert (kept[1:] * kept[:-1]).mean().abs() / 0.21 < 5 * (63 * len(kept)) ** -0.5


@pytest.mark.parametrize("dropout", [1e-9, 1e-5, 0.05, 0.9, 1 - 1e-9])
def test_the_scale_is_that_of_the_share_that_is_kept(dropout: float) -> None:
    known = eager.kernel_dropout(dropout)
    assert 0 < known < 1
    assert abs(known - dropout) <= 2**-16
    operands = operands_of(reference.make_case((2,), 4, 4, 4, torch.float32), dropout=dropout)
    assert backend.members_of(operands).scales[0] * (1 - known) == pytest.approx(0.7)
    words = torch.arange(2**16)
    threshold = (launch.Mask(known).threshold & 0xFFFFFFFF) >> 16
    assert (words >= threshold).double().mean() == 1 - known


def test_none_is_none_whatever_the_seed() -> None:
    """As in eager, an op may get a seed with a probability of 0."""
    case, seed = reference.make_case((300,), 64, 8, 4, torch.float32), torch.tensor([5])
    operands = operands_of(replace(case, weight=None), seeds=seed)
    (y, u), (want, want_u) = (op(case.x, operands) for op in (backend.forward, eager.eager_forward))
    tolerances.check(y, want.double(), tolerances.fp32(80))
    tolerances.check(u, want_u.double(), tolerances.fp32(80))
