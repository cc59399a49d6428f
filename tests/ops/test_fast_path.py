"""On the CPU plain tensors skip the dispatcher: what comes out is the op's, to the bit."""

from __future__ import annotations

import pytest
import reference
import storages
import torch
from calls import run
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorasb
from lorasb import functional
from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear
from lorasb.ops import adapted_linear, composed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fast_path_equals_the_op_to_the_bit(
    dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composed, "SMALL_BYTES", 0)
    case = reference.make_case((5, 3), 24, 20, 4, dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(case, dropout=dropout))
        monkeypatch.setattr(functional, "direct", lambda *_: None)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_second_derivative_is_refused_as_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    for _ in range(2):
        x = case.x.clone().requires_grad_(True)
        y = lora_sb_linear(x, case.weight, case.a, case.core, case.b)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()
        monkeypatch.setattr(functional, "direct", lambda *_: None)


def test_a_second_derivative_through_a_constant_gradient_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of y.sum() is a constant, yet dx depends on R: silence would be a wrong number."""
    monkeypatch.setattr(composed, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    for _ in range(2):
        x, core = case.x.clone().requires_grad_(True), case.core.clone().requires_grad_(True)
        y = lora_sb_linear(x, case.weight, case.a, core, case.b)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum().backward()
        monkeypatch.setattr(functional, "direct", lambda *_: None)


def test_many_gradients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    x = case.x.clone().requires_grad_(True)
    y = lora_sb_linear(x, case.weight, case.a, case.core, case.b)
    dys = torch.stack([case.dy, 2 * case.dy])
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(y, x, case.dy)
    assert torch.allclose(batched[0], single)
    assert torch.allclose(batched[1], 2 * single)


def test_a_gradient_that_is_not_there_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "SMALL_BYTES", 0)

    class Absorb(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> None:
            return None

    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    core = case.core.clone().requires_grad_(True)
    Absorb.apply(lora_sb_linear(case.x, case.weight, case.a, core, case.b)).sum().backward()
    assert core.grad is None


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_frozen_tensors_of_a_quantized_layer_get_no_gradients(backend: str) -> None:
    weight, case = storages.octets(20, 24, torch.float32), reference.make_case((5,), 24, 20, 4, torch.float32)
    assert case.bias is not None
    a, bias = case.a.clone().requires_grad_(True), case.bias.clone().requires_grad_(True)
    with lorasb.backend(backend):
        y = lora_sb_linear(case.x, weight, a, case.core, case.b, bias)
    assert y.requires_grad
    y.sum().backward()
    assert a.grad is None
    assert bias.grad is None


def test_a_checkpoint_recomputes_what_a_mode_saw_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op and the fast path save as many tensors, the seed of dropout among them."""
    monkeypatch.setattr(composed, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    x = case.x.clone().requires_grad_(True)

    def call(x: torch.Tensor) -> torch.Tensor:
        return lora_sb_linear(x, case.weight, case.a, case.core, case.b, dropout=0.5)

    with FlopCounterMode(display=False):
        y = checkpoint(call, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None


def test_transforms_and_modes_meet_the_op() -> None:
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    direct, lists = adapted_linear.direct, [[case.weight], [case.a], [case.core], [case.b]]
    assert direct("auto", case.x, lists, False) is not None
    assert (direct("cpp", case.x, lists, False) is None) == (cpp.missing() is not None)
    assert direct("auto", case.x.to("meta"), lists, False) is None
    with FakeTensorMode():
        assert direct("auto", case.x, lists, False) is None
    seen = []
    torch.func.grad(lambda x: seen.append(direct("auto", case.x, lists, False)) or x.sum())(case.x)
    assert seen == [None]


def test_what_is_frozen_gets_no_gradient_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    for limit in (0, 2**40):
        monkeypatch.setattr(composed, "SMALL_BYTES", limit)
        for tensor in (case.weight, case.a, case.b, case.bias):
            tensor.requires_grad_(True)
        y = lora_sb_linear(case.x.requires_grad_(), case.weight, case.a, case.core, case.b, case.bias)
        y.sum().backward()
        assert case.weight.grad is None
        assert case.bias.grad is None
