"""The adapted linear over quantized weights: every backend and instruction set against fp64, with and without gradients."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch
from calls import check, check_halves, dense, exact, run
from measuring import SETS, allocations, threads
from reference import make_case
from storages import octets, storage, unrounded
from storages import quantized_case as make
from tolerances import EXACT, HALF_FEW, POOL, check_scaled, fp32
from tolerances import check as close

from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear, quantized_linear

BF16 = ("AMX", "AVX-512 with bf16")  # with these, our own product takes any number of tokens
ROWS = (0, 1, 2, 3, 4, 5, 9, 17, 70, 97)
long = pytest.mark.long
SHAPES = [
    (96, 128, 64, False, "nf4"),
    (50, 192, 64, True, "nf4"),
    (33, 256, 128, False, "fp4"),
    (40, 96, 32, True, "nf4"),
    (59, 123, 64, False, "nf4"),
]


@pytest.mark.parametrize(
    ("shape", "rows", "r"),
    [(SHAPES[-1], rows, 16) for rows in ROWS]
    + [(shape, 5, 16) for shape in SHAPES[:-1]]
    + [(SHAPES[0], rows, r) for rows in (1, 33) for r in (1, 3, 17, 64)]
    + [pytest.param(*one, 16, marks=long) for one in itertools.product(SHAPES[:-1], ROWS)],
)
def test_fp32_is_exact_to_rounding(kernel: str, shape: tuple[int, int, int, bool, str], rows: int, r: int) -> None:
    m, n, block, nested, kind = shape
    case = make(storage(m, n, kind, block, nested, torch.float32), rows, r, torch.float32)
    for got, want, length in zip(run(case), exact(case), (n, m, max(1, rows)), strict=True):
        close(got, want, fp32(length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 40, 90])
def test_halves_are_as_near_as_the_chain(kernel: str, rows: int, dtype: torch.dtype) -> None:
    seeds = range(max(3, POOL // (rows * 64)))
    weights = [storage(128, 192, "nf4", 64, seed % 2 == 1, dtype, seed) for seed in seeds]
    check_halves([make(weight, rows, 16, dtype, seed=seed) for seed, weight in enumerate(weights)])


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
        pytest.param(4200, 64, 1024, 64, False, 64, marks=long),
    ],
)
def test_halves_in_any_shape(kernel: str, rows: int, m: int, n: int, block: int, nested: bool, r: int) -> None:
    check_halves([make(storage(m, n, "nf4", block, nested), rows, r, torch.bfloat16)])


@pytest.mark.parametrize("kernel", SETS, indirect=True)
@pytest.mark.parametrize("block", [32, 128, 256, 512, 1024, 2048, 4096])
def test_few_tokens_meet_the_scales_of_every_block(kernel: str, block: int) -> None:
    weight = storage(24, 8192, "nf4", block)
    weight.tensors[1].mul_(1 + torch.arange(len(weight.tensors[1])) % 7)  # a different scale in every block
    x = torch.randn(8, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = x.double() @ unrounded(weight).double().t()
    for rows in range(1, 9):
        y = quantized_linear(x[:rows], weight)
        check_scaled(y, want[:rows], HALF_FEW)


def test_a_weight_stored_in_bf16_and_multiplied_in_fp32_is_rounded_as_bitsandbytes_rounds_it(kernel: str) -> None:
    case = make(storage(96, 128, dtype=torch.bfloat16), 40, 8, torch.float32)
    check(run(case), case)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 40), (torch.bfloat16, 7), (torch.bfloat16, 90)])
def test_dropout_is_the_same_in_forward_and_backward(kernel: str, dtype: torch.dtype, rows: int) -> None:
    case = make(storage(96, 128, dtype=dtype), rows, 8, dtype, bias=False, scaling=1.0)
    found = run(case, dropout=0.5, seed=3)
    twin = replace(case, weight=dense(case).weight)
    for got, want, length in zip(found, run(twin, backend="eager", dropout=0.5, seed=3), (128, 96, rows), strict=True):
        check_scaled(got, want, fp32(length) if dtype == torch.float32 else HALF_FEW)
    adapter = case.b @ case.core.to(dtype) @ case.a
    assert (found[1] - case.dy @ (twin.weight + adapter)).norm() > 0.1 * (case.dy @ adapter).norm()


def test_results_do_not_depend_on_the_number_of_threads_or_the_time(kernel: str) -> None:
    for rows, dtype, r in (
        *itertools.product((1, 5, 40), (torch.float32, torch.bfloat16), (0,)),
        (40, torch.float32, 16),
    ):
        case = make(storage(256, 512, dtype=dtype), rows, r, dtype)
        found = []
        for count in (1, 2, 2):
            with threads(count):
                found.append(run(case))
        # The adapter's thin products may run in a BLAS, which splits some sums by threads.
        ours = r == 0 and kernel != "eager" and (rows < 5 or (kernel in BF16 and dtype == torch.bfloat16))
        for first, second, third in zip(*found, strict=True):
            close(second, third, EXACT)
            if ours:
                close(first, second, EXACT)


def test_any_number_of_dimensions_and_strides(kernel: str) -> None:
    case = make(storage(96, 128, dtype=torch.float32), 0, 8, torch.float32)
    whole = make_case((2, 3, 5), 128, 96, 8, torch.float32).x
    for x in (whole, whole[0], whole[0, 0], whole[0, 0, 0], torch.randn(2, 3, 5, 256)[..., ::2]):
        one = replace(case, x=x, dy=torch.ones(*x.shape[:-1], 96))
        check(run(one, x=x.detach()), one)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
)
def test_without_gradients_the_result_is_the_same_to_the_bit(
    kernel: str, kind: str, stored: torch.dtype, dtype: torch.dtype, autocast: bool
) -> None:
    weight = octets(24, 64, stored) if kind == "int8" else storage(24, 64, dtype=stored, nested=True)
    for rows in (0, 1, 5, 70):
        case = make_case((rows,), 64, 24, 4, dtype)
        x, arguments = case.x.clone().requires_grad_(), (weight, case.a, case.core, case.b, case.bias, 0.7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            want, bare = lora_sb_linear(x, *arguments), quantized_linear(x, weight, case.bias)
            with torch.no_grad():
                assert torch.equal(lora_sb_linear(case.x, *arguments), want.detach())
                assert torch.equal(quantized_linear(case.x, weight, case.bias), bare.detach())


@pytest.mark.parametrize("grad_mode", [False, True])
def test_wrong_arguments_say_what_is_wrong(kernel: str, grad_mode: bool) -> None:
    case = make(storage(96, 128, dtype=torch.float32), 4, 8, torch.float32)
    for change, kind, message in (
        ({"weight": storage(64, 128, dtype=torch.float32)}, ValueError, "quantized weight"),
        ({"x": case.x[:, 1:]}, ValueError, r"expected (x )?\[\.\.\., 128\]"),
        ({"a": case.a.bfloat16()}, TypeError, "lora_A in x's dtype"),
        ({"b": case.b[1:]}, ValueError, "quantized weight"),
        ({"bias": case.bias[1:]}, ValueError, r"bias \[96\]"),
        ({"bias": case.bias.double()}, TypeError, "bias in x's dtype"),
        ({"core": case.core.long()}, TypeError, "lora_R in fp32"),
        ({"core": case.core[1:]}, ValueError, r"expected A \[r, in\]|ranks differ"),
        ({"x": case.x.long()}, TypeError, "expected x in fp64, fp32"),
    ):
        x, weight, a, core, b, bias, *_ = vars(replace(case, **change)).values()
        with torch.set_grad_enabled(grad_mode), pytest.raises(kind, match=message):
            lora_sb_linear(x, weight, a, core, b, bias)


@pytest.mark.parametrize("backend", ["eager", *(("cpp",) if cpp.missing() is None else ())])
def test_opcheck_of_what_records_no_gradient(backend: str) -> None:
    for weight, dtype in (
        (storage(32, 64), torch.bfloat16),
        (storage(32, 64, nested=True, dtype=torch.float32), torch.float32),
        (octets(32, 64, torch.float32), torch.float32),
    ):
        c = make(weight, 6, 4, dtype)
        op = getattr(torch.ops.lorasb, f"dequantize_{backend}")
        torch.library.opcheck(op, (weight.tensors, weight.layout(dtype), 32, 64, dtype))
        if backend == "cpp":
            served = c.x, weight.tensors, weight.layout(), 32, 64, c.a, c.core, c.b, c.bias, 0.7
            torch.library.opcheck(torch.ops.lorasb.serve_quantized_cpp, served)


@pytest.mark.skipif(cpp.missing() is not None, reason="no C++ extension")
@pytest.mark.parametrize("rows", [40, pytest.param(1, marks=long), pytest.param(200, marks=long)])
def test_no_dense_weight_exists_at_any_time(rows: int) -> None:
    m, n = 4096, 2048
    weight, case = storage(m, n), make_case((rows,), n, m, 8, torch.bfloat16)
    gc.collect()
    with allocations() as held:
        y = lora_sb_linear(case.x.requires_grad_(), weight, case.a, case.core.requires_grad_(), case.b)
        y.backward(case.dy)
    assert max(held) < 2 * m * n / 2  # half of a dense W in bf16, activations included
