"""The Triton kernels over weights in 4 bits, interpreted: exact dequantization, both ways of using it, both directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, few_of
from reference import make_case
from storages import bits_of, exact, octets, storage
from tolerances import EXACT, check, fp32
from torch import Tensor

import lorasb
from lorasb.functional import dequantize, lora_sb_linear
from lorasb.kernels import plan
from lorasb.kernels.launcher import observed
from lorasb.quantization.quantized_weight import QuantizedWeight


def run(
    weight: QuantizedWeight,
    rows: int,
    r: int,
    dtype: torch.dtype,
    backend: str,
    bias: bool = True,
    dropout: float = 0.0,
) -> list[Tensor]:
    m, n = weight.shape
    case = make_case((rows,), n, m, r, dtype, bias=bias)
    x, core = case.x.requires_grad_(), case.core.requires_grad_()
    torch.manual_seed(5)
    with lorasb.backend(backend):
        y = lora_sb_linear(x, weight, case.a, core, case.b, case.bias, case.scaling, dropout=dropout)
        y.backward(case.dy)
    return [y.detach(), x.grad, core.grad]


@pytest.fixture(params=plan.WEIGHTS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Inline or by a scratch, whatever the tables say."""
    chosen = plan.choose

    def other(shape: plan.Shape, arch: str, sms: int) -> plan.LaunchPlan:
        found = chosen(shape, arch, sms)
        return plan.LaunchPlan(found.path, found.prep, found.gemm, request.param)

    monkeypatch.setattr(plan, "choose", other)
    plan.forget()
    yield request.param
    plan.forget()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantization_is_exact(kind: str, nested: bool, dtype: torch.dtype) -> None:
    for m, n, block in ((16, 64, 64), (33, 62, 32), (59, 123, 64), (1, 1, 64), (8, 256, 128), (64, 64, 4096)):
        for stored in (torch.float32, torch.float16):
            weight = storage(m, n, kind, block, nested, stored)
            with lorasb.backend("triton"):
                assert torch.equal(bits_of(dequantize(weight, dtype)), bits_of(exact(weight, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "m", "n", "r", "block", "nested"),
    [
        (1, 64, 128, 16, 64, False),
        (5, 70, 96, 3, 32, True),
        (17, 96, 64, 17, 64, False),
        (40, 50, 130, 16, 64, True),
        (5, 70, 128, 3, 64, True),
        (3, 66, 256, 8, 128, False),
        (0, 16, 64, 4, 64, False),
    ],
)
def test_is_the_dense_layer(
    way: str, rows: int, m: int, n: int, r: int, block: int, nested: bool, dtype: torch.dtype
) -> None:
    weight = storage(m, n, "nf4", block, nested, dtype)
    found = run(weight, rows, r, dtype, "triton")
    case = make_case((rows,), n, m, r, dtype).double()
    x, core = case.x.requires_grad_(), case.core.requires_grad_()
    y = x @ exact(weight, torch.float64).t() + case.scaling * (x @ case.a.t() @ core.t() @ case.b.t()) + case.bias
    y.backward(case.dy)
    for got, want, length in zip(found, (y.detach(), x.grad, core.grad), (n, m, max(1, rows)), strict=True):
        scale = want.abs().max().clamp_min(1.0) if want.numel() else 1.0
        check(got.double() / scale, want / scale, fp32(length) if dtype == torch.float32 else few_of(dtype))


def test_odd_features_and_8_bits_take_the_scratch_or_torch(way: str) -> None:
    for weight in (storage(40, 63, dtype=torch.float32), octets(40, 64, torch.float32)):
        for got, want in zip(*(run(weight, 9, 4, torch.float32, name) for name in ("triton", "eager")), strict=True):
            check(got, want, fp32(64))


def test_launches(way: str) -> None:
    weight = storage(64, 128, dtype=torch.float32)
    with observed() as launches:
        run(weight, 5, 4, torch.float32, "triton")
    names = [one.name for one in launches]
    if way == "inline":
        assert names == ["prep_forward", "quantized_gemm", "prep_backward", "extended_gemm", "quantized_gemm"]
    else:
        assert names == ["prep_forward_quantized", "extended_gemm", "prep_backward_quantized", "extended_gemm"]


def test_repeats_to_the_bit(way: str) -> None:
    weight = storage(64, 512, dtype=torch.float32)
    first = run(weight, 5, 16, torch.float32, "triton")
    for _ in range(3):
        for got, want in zip(run(weight, 5, 16, torch.float32, "triton"), first, strict=True):
            check(got, want, EXACT)


def test_dropout_masks_are_the_dense_kernels_own(way: str) -> None:
    weight = storage(48, 64, dtype=torch.float32)
    found = run(weight, 20, 8, torch.float32, "triton", dropout=0.5)
    case = make_case((20,), 64, 48, 8, torch.float32)
    x, core = case.x.requires_grad_(), case.core.requires_grad_()
    torch.manual_seed(5)
    with lorasb.backend("triton"):
        y = lora_sb_linear(x, exact(weight, torch.float32), case.a, core, case.b, case.bias, case.scaling, dropout=0.5)
        y.backward(case.dy)
    for got, want in zip(found, (y.detach(), x.grad, core.grad), strict=True):
        check(got, want, fp32(64))


def test_the_tables_choose_by_tokens() -> None:
    for arch, limit in (
        ("sm_80", 256),
        ("sm_86", 256),
        ("sm_89", 256),
        ("sm_90", 64),
        ("sm_100", 64),
        ("sm_120", 256),
        ("sm_75", 16),
    ):
        for M, weights in ((1, "inline"), (limit, "inline"), (2 * limit, "scratch")):
            shape = plan.Shape("forward", "bf16", M, 4096, 4096, 96, 1, "4bit")
            assert plan.choose(shape, arch, 100).weights == weights


def test_a_table_with_another_way_is_refused() -> None:
    with pytest.raises(ValueError, match="inline or scratch"):
        plan.Rule.from_json({"weights": "whole"})


@pytest.mark.parametrize(
    ("n", "block", "byte", "shared"),
    [
        (128, 64, 0, True),
        (256, 128, 4, True),
        (128, 32, 0, True),
        (96, 64, 0, False),
        (128, 4096, 0, False),
        (128, 64, 1, False),  # tiles are read in words
        (128, 64, 6, False),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_rows_of_a_tile_have_one_scale_each_where_blocks_allow(
    n: int, block: int, byte: int, shared: bool, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways decode to the same bits, wherever the first byte lies: y of the unit vectors is W."""
    chosen = plan.choose
    monkeypatch.setattr(plan, "choose", lambda *given: replace(chosen(*given), weights="inline"))
    plan.forget()
    weight = storage(70, n, block=block, nested=nested, dtype=torch.float16)
    codes = weight.tensors[0]
    moved = codes.new_empty(codes.numel() + byte)[byte:].view(codes.shape).copy_(codes)
    weight = QuantizedWeight([moved, *weight.tensors[1:]], weight.shape, weight.dtype, weight.kind, weight.block)
    x, none = torch.eye(n, dtype=torch.float16), torch.zeros(0, dtype=torch.float32)
    with lorasb.backend("triton"), observed() as launches:
        a, b = none.new_zeros((1, n)).half(), none.new_zeros((70, 1)).half()
        y = lora_sb_linear(x, weight, a, none.new_zeros((1, 1)), b)
    (gemm,) = (one for one in launches if one.name == "quantized_gemm")
    assert gemm.arguments["ONE_SCALE"] == shared
    assert torch.equal(y.t(), exact(weight, torch.float16))
    plan.forget()
