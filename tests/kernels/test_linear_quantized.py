"""The Triton kernels with 4-bit weights, interpreted: exact dequantization, inline or by scratch, both directions."""

from collections.abc import Iterator

import pytest
import reference
import torch
from calls import dense, few_of, run, run_kernels
from kernel_cases import DTYPES, planned
from storages import bits_of, exact, octets, storage
from storages import quantized_case as make
from tolerances import check, check_scaled, fp32

import lorasb
from lorasb.functional import dequantize, lora_sb_linear
from lorasb.kernels import plan
from lorasb.kernels.launcher import observed
from lorasb.quantization.quantized_weight import QuantizedWeight


@pytest.fixture(params=plan.CHOICES["weights"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with planned(weights=request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("fp4", True)])
def test_dequantization_is_exact(kind: str, nested: bool, dtype: torch.dtype) -> None:
    for m, n, block in ((16, 64, 64), (33, 62, 32), (59, 123, 64), (1, 1, 64), (8, 256, 128), (64, 64, 4096)):
        for stored in (torch.float32, torch.float16):
            weight = storage(m, n, kind, block, nested, stored)
            with lorasb.backend("triton"):
                assert torch.equal(bits_of(dequantize(weight, dtype)), bits_of(exact(weight, dtype)))


SHAPES = [
    (1, 64, 128, 16, 64, False),
    (5, 70, 96, 3, 32, True),
    (17, 96, 64, 17, 64, False),
    (40, 50, 130, 16, 64, True),
    (5, 70, 128, 3, 64, True),
    (3, 66, 256, 8, 128, False),
    (0, 16, 64, 4, 64, False),
]


@pytest.mark.parametrize(
    ("rows", "m", "n", "r", "block", "nested", "dtype"),
    [(*shape, DTYPES[0]) for shape in SHAPES] + [(*shape, DTYPES[1]) for shape in SHAPES[:3]],
)
def test_is_the_dense_layer(
    way: str, rows: int, m: int, n: int, r: int, block: int, nested: bool, dtype: torch.dtype
) -> None:
    case = make(storage(m, n, "nf4", block, nested, dtype), rows, r, dtype)
    wanted = reference.by_formulas(dense(case).double())
    for got, want, length in zip(run_kernels(case), wanted, (n, m, max(1, rows)), strict=True):
        check_scaled(got, want, fp32(length) if dtype == torch.float32 else few_of(dtype), 1.0)


def test_odd_features_and_8_bits_take_the_scratch_or_torch(way: str) -> None:
    for weight in (storage(40, 63, dtype=torch.float32), octets(40, 64, torch.float32)):
        case = make(weight, 9, 4, torch.float32)
        check(run_kernels(case), run(case, backend="eager"), fp32(64))


def test_launches(way: str) -> None:
    with observed() as launches:
        run_kernels(make(storage(64, 128, dtype=torch.float32), 5, 4, torch.float32))
    names = [one.name for one in launches]
    if way == "inline":
        assert names == ["prep_forward", "quantized_gemm", "prep_backward", "quantized_gemm", "extended_gemm"]
    else:
        assert names == ["prep_forward", "extended_gemm", "prep_backward", "extended_gemm"]


def test_dropout_masks_are_the_dense_kernels_own(way: str) -> None:
    case = make(storage(48, 64, dtype=torch.float32), 20, 8, torch.float32)
    check(*(run_kernels(one, dropout=0.5, seed=5) for one in (case, dense(case))), fp32(64))


def test_the_tables_choose_by_tokens() -> None:
    limits = {"sm_80": 256, "sm_86": 256, "sm_89": 256, "sm_90": 64, "sm_100": 32, "sm_120": 256}
    for arch, limit in limits.items():
        for M, weights in ((1, "inline"), (limit, "inline"), (2 * limit, "scratch")):
            shape = plan.Shape("forward", "bf16", M, 4096, 4096, 96, 1, "4bit")
            assert plan.choose(shape, arch, 100).weights == weights


@pytest.mark.parametrize(
    ("n", "block", "byte", "shared", "nested"),
    [
        (128, 64, 0, True, False),
        (128, 64, 0, True, True),
        (256, 128, 4, True, True),
        (128, 32, 0, True, True),
        (96, 64, 0, False, False),
        (96, 64, 0, False, True),
        (128, 4096, 0, False, True),
        (128, 64, 1, False, True),  # not aligned to the words in which tiles are read
        (128, 64, 6, False, True),
    ],
)
def test_the_rows_of_a_tile_have_one_scale_each_where_blocks_allow(
    n: int, block: int, byte: int, shared: bool, nested: bool
) -> None:
    """Both ways decode to the same bits, at any offset of the first byte: y of the unit vectors is W."""
    weight = storage(70, n, block=block, nested=nested, dtype=torch.float16)
    codes = weight.tensors[0]
    moved = codes.new_empty(codes.numel() + byte)[byte:].view(codes.shape).copy_(codes)
    weight = QuantizedWeight([moved, *weight.tensors[1:]], weight.shape, weight.dtype, weight.kind, weight.block)
    x, none = torch.eye(n, dtype=torch.float16), torch.zeros(0, dtype=torch.float32)
    with planned(weights="inline"), lorasb.backend("triton"), observed() as launches:
        a, b = none.new_zeros((1, n)).half(), none.new_zeros((70, 1)).half()
        y = lora_sb_linear(x, weight, a, none.new_zeros((1, 1)), b)
    (gemm,) = (one for one in launches if one.name == "quantized_gemm")
    assert gemm.arguments["ONE_SCALE"] == shared
    assert torch.equal(y.t(), exact(weight, torch.float16))
