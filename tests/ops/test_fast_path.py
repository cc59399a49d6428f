"""On the CPU plain tensors skip the dispatcher: what comes out is the op's, to the bit."""

from __future__ import annotations

import pytest
import reference
import torch
from calls import run
from torch._subclasses import FakeTensorMode

from lorasb.backends import cpp
from lorasb.functional import lora_sb_linear
from lorasb.ops import fast_path as direct

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fast_path_equals_the_op_to_the_bit(
    dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "SMALL_BYTES", 0)
    case = reference.make_case((5, 3), 24, 20, 4, dtype)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(run(case, dropout=dropout))
        monkeypatch.setattr(direct, "kernels", lambda *_: None)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_second_derivative_is_refused_as_by_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    for _ in range(2):
        x = case.x.clone().requires_grad_(True)
        y = lora_sb_linear(x, case.weight, case.a, case.core, case.b)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivative|differentiate twice"):
            dx.sum().backward()
        monkeypatch.setattr(direct, "kernels", lambda *_: None)


def test_transforms_and_modes_meet_the_op() -> None:
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    tensors = (case.x, case.weight, case.a, case.core, case.b)
    assert direct.kernels("linear", "auto", *tensors) is not None
    assert (direct.kernels("linear", "cpp", *tensors) is None) == (cpp.missing() is not None)
    assert direct.kernels("linear", "auto", case.x.to("meta"), *tensors[1:]) is None
    with FakeTensorMode():
        assert direct.kernels("linear", "auto", *tensors) is None
    seen = []
    torch.func.grad(lambda x: seen.append(direct.kernels("linear", "auto", *tensors)) or x.sum())(case.x)
    assert seen == [None]


def test_what_is_frozen_gets_no_gradient_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    for limit in (0, 2**40):
        monkeypatch.setattr(direct, "SMALL_BYTES", limit)
        for tensor in (case.weight, case.a, case.b, case.bias):
            tensor.requires_grad_(True)
        y = lora_sb_linear(case.x.requires_grad_(), case.weight, case.a, case.core, case.b, case.bias)
        y.sum().backward()
        assert case.weight.grad is None
        assert case.bias.grad is None
