"""The adapted linear over quantized weights under autograd, autocast and compilation: gradients, memory, bad arguments."""

from __future__ import annotations

import gc

import pytest
import torch
from calls import opcheck, operands_of
from reference import make_case
from storages import exact, octets, storage
from tolerances import EXACT, FP64, GRADCHECK, check
from torch import Tensor

from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear, quantized_linear


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
        opcheck(name, operands_of(case, base=(weight.tensors, layout)), case)
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


def test_compiles_in_one_graph_to_the_same_bits() -> None:
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
