"""The adapted linear over quantized weights: every backend and instruction set against fp64, and what autograd makes of it."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from reference import make_case
from storages import exact, octets, storage, unrounded
from tolerances import EXACT, FP64, GRADCHECK, HALF_FEW, POOL, check, check_half, fp32
from torch import Tensor

import lorasb
from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear, quantized_linear
from lorasb.quantization.quantized_weight import QuantizedWeight

BF16 = ("AMX", "AVX-512 with bf16")  # where our own product takes any number of tokens
KERNELS = ["eager", *cpp.instruction_sets()] if cpp.missing() is None else ["eager"]
ROWS = (0, 1, 2, 3, 4, 5, 9, 17, 70, 97)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest):
    """Eager, then the C++ kernels of every instruction set that this processor has."""
    if request.param == "eager":
        with lorasb.backend("eager"):
            yield request.param
        return
    cpp.use_instruction_set(request.param)
    with lorasb.backend("cpp"):
        yield request.param
    cpp.use_instruction_set("")


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
def test_any_rank(kernel: str, r: int) -> None:
    for rows in (1, 33):
        ours, _, truth = run(storage(96, 128, dtype=torch.float32), rows, r, torch.float32, bias=False)
        for got, want in zip(ours, truth, strict=True):
            check(got, want, fp32(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_octets(kernel: str, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradcheck_with_a_dequantized_twin(kernel: str, kind: str) -> None:
    weight = storage(6, 32, dtype=torch.float32) if kind == "nf4" else octets(6, 32, torch.float32)
    case = make_case((3,), 32, 6, 4, torch.float64)
    x, core = case.x.requires_grad_(), case.core.requires_grad_()
    torch.autograd.gradcheck(
        lambda x, core: lora_sb_linear(x, weight, case.a, core, case.b, case.bias, 0.7), (x, core), **GRADCHECK
    )
    ours = lora_sb_linear(x, weight, case.a, core, case.b, case.bias, 0.7)
    check(ours, lora_sb_linear(x, exact(weight, torch.float64), case.a, core, case.b, case.bias, 0.7), FP64)


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


def test_shapes_and_strides(kernel: str) -> None:
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


def test_without_an_adapter(kernel: str) -> None:
    weight = storage(96, 128, dtype=torch.float32)
    x, bias = torch.randn(7, 128, requires_grad=True), torch.randn(96)
    y = quantized_linear(x, weight, bias)
    y.sum().backward()
    dense = exact(weight, torch.float64)
    check(y, x.detach().double() @ dense.t() + bias, fp32(128))
    check(x.grad, torch.ones(7, 96).double() @ dense, fp32(96))


def test_autocast_is_linears_own(kernel: str) -> None:
    weight, case = storage(96, 128, dtype=torch.bfloat16), make_case((40,), 128, 96, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_sb_linear(case.x, weight, case.a, case.core, case.b, case.bias)
        assert y.dtype == torch.bfloat16
        y.sum().backward() if y.requires_grad else None


@pytest.mark.parametrize("name", [k for k in ("eager", "cpp") if k == "eager" or cpp.missing() is None])
def test_opcheck(name: str) -> None:
    for weight, dtype in (
        (storage(32, 64), torch.bfloat16),
        (storage(32, 64, nested=True, dtype=torch.float32), torch.float32),
        (octets(32, 64, torch.float32), torch.float32),
    ):
        case = make_case((6,), 64, 32, 4, dtype)
        x, core = case.x.requires_grad_(), case.core.requires_grad_()
        layout = weight.layout(dtype)
        op = getattr(torch.ops.lorasb, f"linear_quantized_{name}")
        torch.library.opcheck(op, (x, weight.tensors, layout, case.a, core, case.b, case.bias, 0.7, 0.0, None))
        if name == "cpp":
            served = (
                x.detach(),
                weight.tensors,
                weight.storage_layout,
                32,
                64,
                case.a,
                core.detach(),
                case.b,
                case.bias,
                0.7,
            )
            torch.library.opcheck(torch.ops.lorasb.serve_quantized_cpp, served)
        torch.library.opcheck(getattr(torch.ops.lorasb, f"dequantize_{name}"), (weight.tensors, layout, 32, 64, dtype))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
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


def test_without_gradients_wrong_arguments_are_named_too(kernel: str) -> None:
    weight, case = storage(96, 128, dtype=torch.float32), make_case((4,), 128, 96, 8, torch.float32)
    wrong = [
        ({"x": case.x[:, 1:]}, ValueError, r"expected (x )?\[\.\.\., 128\]"),
        ({"a": case.a.bfloat16()}, TypeError, "lora_A in x's dtype"),
        ({"b": case.b[1:]}, ValueError, "quantized weight"),
        ({"bias": case.bias[1:]}, ValueError, "bias \\[96\\]"),
        ({"bias": case.bias.double()}, TypeError, "bias in x's dtype"),
        ({"core": case.core.long()}, TypeError, "lora_R in fp32"),
        ({"core": case.core[1:]}, ValueError, "expected A \\[r, in\\]|ranks differ"),
        ({"x": case.x.long()}, TypeError, "expected x in fp64, fp32"),
    ]
    for change, kind, message in wrong:
        given = {"x": case.x, "weight": weight, "a": case.a, "core": case.core, "b": case.b, "bias": case.bias} | change
        with torch.no_grad(), pytest.raises(kind, match=message):
            lora_sb_linear(*given.values())


def test_compiles_in_one_graph() -> None:
    weight, case = storage(96, 128, dtype=torch.float32), make_case((8,), 128, 96, 8, torch.float32)

    def layer(x: Tensor, core: Tensor) -> Tensor:
        return lora_sb_linear(x, weight, case.a, core, case.b, case.bias).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, core = case.x.requires_grad_(), case.core.requires_grad_()
    check(compiled(x, core), layer(x, core), EXACT)
    with torch.no_grad():
        check(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, core), layer(x, core), EXACT)
    got = torch.autograd.grad(compiled(x, core).sum(), (x, core))
    for one, other in zip(got, torch.autograd.grad(layer(x, core).sum(), (x, core)), strict=True):
        check(one, other, EXACT)


def test_keeps_u_and_no_dense_weight() -> None:
    weight, case = storage(256, 512, dtype=torch.bfloat16), make_case((40,), 512, 256, 8, torch.bfloat16)
    own = {t.data_ptr() for t in (*weight.tensors, case.a, case.b, case.core)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_sb_linear(case.x.requires_grad_(), weight, case.a, case.core.requires_grad_(), case.b)
    others = [t for t in kept if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in others] == [(40, 8)]


@pytest.mark.skipif(cpp.missing() is not None, reason="no C++ extension")
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_no_dense_weight_exists_at_any_time(rows: int) -> None:
    m, n = 4096, 2048
    weight, case = storage(m, n), make_case((rows,), n, m, 8, torch.bfloat16)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = lora_sb_linear(case.x.requires_grad_(), weight, case.a, case.core.requires_grad_(), case.b)
        y.backward(case.dy)
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak < 2 * m * n / 2  # half of a dense W in bf16, activations included


def test_wrong_arguments_say_what_is_wrong() -> None:
    weight, case = storage(96, 128, dtype=torch.float32), make_case((4,), 128, 96, 8, torch.float32)
    with pytest.raises(ValueError, match="quantized weight"):
        lora_sb_linear(case.x, storage(64, 128, dtype=torch.float32), case.a, case.core, case.b)
    with pytest.raises(TypeError, match="lora_A"):
        lora_sb_linear(case.x.bfloat16(), weight, case.a, case.core, case.b)
    with pytest.raises(ValueError, match="expected x"):
        lora_sb_linear(case.x[:, :64], weight, case.a, case.core, case.b)
