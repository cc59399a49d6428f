"""On the CPU plain tensors skip the dispatcher: what comes out is the op's, to the bit."""

from __future__ import annotations

import pytest
import reference
import torch
from calls import KINDS, make_call, run
from tolerances import check_equal
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lorasb import functional
from lorasb.backends import eager
from lorasb.functional import lora_sb_linear


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> reference.Case:
    """Of a call that has a backward of our own."""
    monkeypatch.setattr(eager, "SMALL_BYTES", 0)
    return reference.make_case((5,), 24, 20, 4, torch.float32)


def by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "direct_kernels", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "dropout"])
def test_the_fast_path_equals_the_op_to_the_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SMALL_BYTES", 0)
    cases, options = make_call(kind, dtype)
    results = []
    for _ in range(2):
        results.append(run(*cases, **options, seed=1))
        by_the_op(monkeypatch)
    check_equal(*results)


@pytest.mark.parametrize("constant", [False, True])
def test_a_second_derivative_is_refused_as_by_the_op(
    case: reference.Case, constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of y.sum(), too, whose gradient is a constant, yet dx depends on R: silence would be a wrong number."""
    for _ in range(2):
        x, core = case.x.clone().requires_grad_(True), case.core.clone().requires_grad_(constant)
        y = lora_sb_linear(x, case.weight, case.a, core, case.b)
        loss = (y if constant else y.square()).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward()
        by_the_op(monkeypatch)


def test_many_gradients_at_once(case: reference.Case) -> None:
    x = case.x.clone().requires_grad_(True)
    y = lora_sb_linear(x, case.weight, case.a, case.core, case.b)
    dys = torch.stack([case.dy, 2 * case.dy])
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(y, x, case.dy)
    assert torch.allclose(batched[0], single)
    assert torch.allclose(batched[1], 2 * single)


def test_a_gradient_that_is_not_there_leaves_none(case: reference.Case) -> None:
    class Absorb(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> None:
            return None

    core = case.core.clone().requires_grad_(True)
    Absorb.apply(lora_sb_linear(case.x, case.weight, case.a, core, case.b)).sum().backward()
    assert core.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_frozen_tensors_get_no_gradients(kind: str, composed: bool, backend: str) -> None:
    cases, options = make_call(kind, torch.float32)
    frozen = [t for c in cases for t in (c.weight, c.a, c.b, c.bias) if isinstance(t, torch.Tensor)]
    for tensor in frozen:
        tensor.requires_grad_(True)
    run(*cases, backend=backend, **options)
    assert [tensor.grad for tensor in frozen] == [None] * len(frozen)


def test_a_checkpoint_recomputes_what_a_mode_saw_forward(case: reference.Case) -> None:
    """The op and the fast path save as many tensors, the seed of dropout among them."""
    x = case.x.clone().requires_grad_(True)

    def call(x: torch.Tensor) -> torch.Tensor:
        return lora_sb_linear(x, case.weight, case.a, case.core, case.b, dropout=0.5)

    with FlopCounterMode(display=False):
        y = checkpoint(call, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
