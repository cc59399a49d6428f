"""The adapted linear over quantized weights: every backend and instruction set against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import make_case
from storages import exact, octets, storage, unrounded
from tolerances import EXACT, HALF_FEW, POOL, check, check_half, fp32
from torch import Tensor

import lorasb
from lorasb.functional import lora_sb_linear, quantized_linear
from lorasb.quantization.quantized_weight import QuantizedWeight

BF16 = ("AMX", "AVX-512 with bf16")  # where our own product takes any number of tokens
ROWS = (0, 1, 2, 3, 4, 5, 9, 17, 70, 97)


def run(
    weight: QuantizedWeight, rows: int, r: int, dtype: torch.dtype, bias: bool = True, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y, dx, dR of the layer; of the plain chain over the dequantized weight; and exactly.

    In 16 bits W is rounded on the way to a product, by the chain in each element: exact is what the storage stands for.
    """
    m, n = weight.shape
    case = make_case((rows,), n, m, r, dtype, bias=bias, seed=seed)
    dense = exact(weight, dtype)

    def through(
        x: Tensor, w: Tensor | QuantizedWeight, a: Tensor, core: Tensor, b: Tensor, bias: Tensor | None, plain: bool
    ) -> list[Tensor]:
        x, core = x.clone().requires_grad_(), core.clone().requires_grad_()
        if plain:
            y = torch.nn.functional.linear(x, w, bias) + case.scaling * (x @ a.t() @ core.t().to(x.dtype) @ b.t())
        else:
            y = lora_sb_linear(x, w, a, core, b, bias, case.scaling)
        y.backward(case.dy.to(y.dtype))
        return [y.detach(), x.grad, core.grad]

    ours = through(case.x, weight, case.a, case.core, case.b, case.bias, False)
    chain = through(case.x, dense, case.a, case.core, case.b, case.bias, True)
    wide = case.double()
    meant = dense if dtype == torch.float32 else unrounded(weight)
    truth = through(wide.x, meant.double(), wide.a, wide.core, wide.b, wide.bias, True)
    return ours, chain, truth


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("m", "n", "block", "nested", "kind"),
    [
        (96, 128, 64, False, "nf4"),
        (50, 192, 64, True, "nf4"),
        (33, 256, 128, False, "fp4"),
        (40, 96, 32, True, "nf4"),
        (59, 123, 64, False, "nf4"),
    ],
)
def test_fp32_is_exact_to_rounding(kernel: str, m: int, n: int, block: int, nested: bool, kind: str, rows: int) -> None:
    weight = storage(m, n, kind, block, nested, torch.float32)
    ours, _, truth = run(weight, rows, 16, torch.float32)
    for got, want, length in zip(ours, truth, (n, m, max(1, rows)), strict=True):
        check(got, want, fp32(length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 40, 90])
def test_halves_are_as_near_as_the_chain(kernel: str, rows: int, dtype: torch.dtype) -> None:
    parts: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(max(3, POOL // (rows * 64))):
        weight = storage(128, 192, "nf4", 64, seed % 2 == 1, dtype, seed)
        for part, found in zip(parts, run(weight, rows, 16, dtype, seed=seed), strict=True):
            part.append(found)
    ours, chain, truth = ([torch.cat([f[i].flatten().double() for f in part]) for i in range(3)] for part in parts)
    for got, plain, want in zip(ours, chain, truth, strict=True):
        check_half(got, plain, want)


@pytest.mark.parametrize(
    ("rows", "m", "n", "block", "nested", "r"),
    [
        (6, 97, 192, 64, True, 3),
        (9, 257, 1088, 64, False, 33),
        (12, 700, 512, 32, False, 0),
        (21, 129, 2048, 1024, True, 16),
        (64, 43, 1536, 512, False, 40),
        (67, 31, 1088, 64, False, 17),
        (523, 145, 608, 32, True, 96),
        (1100, 40, 640, 128, False, 5),
        (4200, 64, 1024, 64, False, 64),
    ],
)
def test_halves_in_any_shape(kernel: str, rows: int, m: int, n: int, block: int, nested: bool, r: int) -> None:
    ours, chain, truth = run(storage(m, n, "nf4", block, nested), rows, r, torch.bfloat16)
    for got, plain, want in list(zip(ours, chain, truth, strict=True))[: 3 if r * r >= POOL else 2]:
        check_half(got, plain, want)


@pytest.mark.parametrize("block", [32, 128, 256, 512, 1024, 2048, 4096])
def test_few_tokens_meet_the_scales_of_every_block(kernel: str, block: int) -> None:
    weight = storage(24, 8192, "nf4", block)
    weight.tensors[1].mul_(1 + torch.arange(len(weight.tensors[1])) % 7)  # another scale in every block
    x = torch.randn(8, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = x.double() @ unrounded(weight).double().t()
    for rows in range(1, 9):
        y = quantized_linear(x[:rows], weight)
        check(y.double() / want.abs().max(), want[:rows] / want.abs().max(), HALF_FEW)


@pytest.mark.parametrize("r", [1, 3, 16, 17, 64])
def test_any_rank_is_exact_to_rounding(kernel: str, r: int) -> None:
    for rows in (1, 33):
        ours, _, truth = run(storage(96, 128, dtype=torch.float32), rows, r, torch.float32, bias=False)
        for got, want in zip(ours, truth, strict=True):
            check(got, want, fp32(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bits_are_what_they_stand_for(kernel: str, dtype: torch.dtype) -> None:
    for rows in (1, 5, 40):
        ours, chain, truth = run(octets(48, 96, dtype), rows, 8, dtype)
        for got, plain, want in zip(ours, chain, truth, strict=True):
            tolerance = fp32(96) if dtype == torch.float32 else HALF_FEW
            scale = want.abs().max().clamp_min(1.0)
            check(got.double() / scale, want / scale, tolerance)
            assert plain.shape == got.shape


def test_a_weight_stored_in_bf16_and_multiplied_in_fp32_is_rounded_as_bitsandbytes_rounds_it(kernel: str) -> None:
    weight = storage(96, 128, dtype=torch.bfloat16)
    ours, _, truth = run(weight, 40, 8, torch.float32)
    for got, want in zip(ours, truth, strict=True):
        check(got, want, fp32(128))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 40), (torch.bfloat16, 7), (torch.bfloat16, 90)])
def test_dropout_is_the_same_in_forward_and_backward(kernel: str, dtype: torch.dtype, rows: int) -> None:
    weight, case = storage(96, 128, dtype=dtype), make_case((rows,), 128, 96, 8, dtype, bias=False)
    dense = exact(weight, dtype)

    def through(w: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
        x, core = case.x.clone().requires_grad_(), case.core.clone().requires_grad_()
        torch.manual_seed(3)
        y = lora_sb_linear(x, w, case.a, core, case.b, dropout=0.5)
        y.backward(case.dy)
        return y.detach(), x.grad, core.grad

    with lorasb.backend("eager"):
        plain = through(dense)
    for got, want, length in zip(through(weight), plain, (128, 96, rows), strict=True):
        scale = want.double().abs().max()
        check(got / scale, want / scale, fp32(length) if dtype == torch.float32 else HALF_FEW)
    adapter = case.b @ case.core.to(dtype) @ case.a
    assert (through(weight)[1] - case.dy @ (dense + adapter)).norm() > 0.1 * (case.dy @ adapter).norm()


def test_results_do_not_depend_on_the_number_of_threads_or_the_time(kernel: str) -> None:
    before = torch.get_num_threads()
    for rows, dtype, r in itertools.product((1, 5, 40), (torch.float32, torch.bfloat16), (0, 16)):
        weight = storage(256, 512, dtype=dtype)
        try:
            found = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                found.append(run(weight, rows, r, dtype)[0])
        finally:
            torch.set_num_threads(before)
        # The adapter's thin products may be the BLAS's, which cuts some sums by threads.
        ours = r == 0 and kernel != "eager" and (rows < 5 or (kernel in BF16 and dtype == torch.bfloat16))
        for first, second, third in zip(*found, strict=True):
            check(second, third, EXACT)
            if ours:
                check(first, second, EXACT)


def test_any_number_of_dimensions_and_strides(kernel: str) -> None:
    weight = storage(96, 128, dtype=torch.float32)
    case = make_case((2, 3, 5), 128, 96, 8, torch.float32)
    wide = torch.randn(2, 3, 5, 256)[..., ::2]
    for x in (case.x, case.x[0], case.x[0, 0], case.x[0, 0, 0], wide):
        y = lora_sb_linear(x, weight, case.a, case.core, case.b, case.bias)
        want = lora_sb_linear(
            x.double(),
            exact(weight, torch.float64),
            case.a.double(),
            case.core.double(),
            case.b.double(),
            case.bias.double(),
        )
        assert y.shape == (*x.shape[:-1], 96)
        check(y, want, fp32(128))


def test_without_an_adapter_it_is_a_linear(kernel: str) -> None:
    weight = storage(96, 128, dtype=torch.float32)
    x, bias = torch.randn(7, 128, requires_grad=True), torch.randn(96)
    y = quantized_linear(x, weight, bias)
    y.sum().backward()
    dense = exact(weight, torch.float64)
    check(y, x.detach().double() @ dense.t() + bias, fp32(128))
    check(x.grad, torch.ones(7, 96).double() @ dense, fp32(96))
