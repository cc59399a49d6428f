"""Which backend computes a call, and the calls that skip the dispatcher on a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from calls import run
from torch._subclasses import FakeTensorMode

import lorasb
from lorasb.backends import cpp
from lorasb.backends.eager import linear as eager
from lorasb.functional import lora_sb_linear
from lorasb.ops import cpu_fast_path as direct

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TestBackends:
    def test_explicit_eager_equals_auto(self) -> None:
        case = reference.make_case((5,), 24, 20, 4, torch.float32)
        want = run(case)
        with lorasb.backend("eager"):
            got = run(case)
        for first, second in zip(got, want, strict=True):
            assert torch.equal(first, second)

    def test_the_forward_decides_for_its_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "SMALL_BYTES", 0)
        case = reference.make_case((5,), 24, 20, 4, torch.float32)
        core = case.core.requires_grad_(True)
        with lorasb.backend("eager"):
            y = lora_sb_linear(case.x, case.weight, case.a, core, case.b)
            with FakeTensorMode(allow_non_fake_inputs=True):  # what wraps tensors meets the op itself
                traced = lora_sb_linear(case.x, case.weight, case.a, core, case.b)
        assert y.grad_fn.kernel is eager.backward
        assert "linear_eager" in type(traced.grad_fn).__name__

    @pytest.mark.parametrize("name", ["cpp"])
    def test_a_missing_backend_raises_and_says_why(self, name: str) -> None:
        from lorasb.ops.registry import unavailable

        if unavailable(name) is None:
            pytest.skip(f"{name} is here")
        with pytest.raises(RuntimeError, match=rf"backend '{name}' is not available: .+"), lorasb.backend(name):
            pass

    def test_an_unknown_backend_is_named(self) -> None:
        with (
            pytest.raises(ValueError, match="unknown backend 'cuda': expected one of auto, eager"),
            lorasb.backend("cuda"),
        ):
            pass

    def test_environment_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lorasb.ops import registry as ops

        monkeypatch.setattr(ops, "_from_environment", "")
        monkeypatch.setenv("LORASB_BACKEND", "eager")
        assert ops.current_backend() == "eager"
        with lorasb.backend("auto"):
            assert ops.current_backend() == "auto"
        monkeypatch.setenv("LORASB_BACKEND", "fast")
        assert ops.current_backend() == "eager"  # read once
        monkeypatch.setattr(ops, "_from_environment", "")
        with pytest.raises(ValueError, match="unknown backend 'fast'"):
            ops.current_backend()

    def test_nesting_restores(self) -> None:
        from lorasb.ops.registry import current_backend

        with lorasb.backend("eager"):
            with lorasb.backend("auto"):
                assert current_backend() == "auto"
            assert current_backend() == "eager"
        assert current_backend() == "auto"

    def test_threads_do_not_disturb_each_other(self) -> None:
        from lorasb.ops.registry import current_backend

        inside, leave = threading.Barrier(3), threading.Barrier(3)

        def within(name: str) -> list[str]:
            seen = [current_backend()]
            with lorasb.backend(name):
                inside.wait(30)  # both are in their blocks now
                seen.append(current_backend())
                leave.wait(30)
            return [*seen, current_backend()]

        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(within, name) for name in ("eager", "auto")]
            with lorasb.backend("eager"):
                inside.wait(30)
                assert current_backend() == "eager"
                leave.wait(30)
            assert [one.result() for one in found] == [["auto", "eager", "auto"], ["auto", "auto", "auto"]]


class TestDirect:
    """On the CPU plain tensors skip the dispatcher: what comes out is the op's, to the bit."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_equals_the_op(self, dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "SMALL_BYTES", 0)
        case = reference.make_case((5, 3), 24, 20, 4, dtype)
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            results.append(run(case, dropout=dropout))
            monkeypatch.setattr(direct, "kernels", lambda *_: None)
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)

    def test_a_second_derivative_is_refused_as_by_the_op(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(direct, "SMALL_BYTES", 0)
        case = reference.make_case((5,), 24, 20, 4, torch.float32)
        for _ in range(2):
            x = case.x.clone().requires_grad_(True)
            y = lora_sb_linear(x, case.weight, case.a, case.core, case.b)
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match=r"no second derivative|differentiate twice"):
                dx.sum().backward()
            monkeypatch.setattr(direct, "kernels", lambda *_: None)

    def test_transforms_and_modes_meet_the_op(self) -> None:
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

    def test_what_is_frozen_gets_no_gradient_whatever_the_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = reference.make_case((5,), 24, 20, 4, torch.float32)
        for limit in (0, 2**40):
            monkeypatch.setattr(direct, "SMALL_BYTES", limit)
            for tensor in (case.weight, case.a, case.b, case.bias):
                tensor.requires_grad_(True)
            y = lora_sb_linear(case.x.requires_grad_(), case.weight, case.a, case.core, case.b, case.bias)
            y.sum().backward()
            assert case.weight.grad is None
            assert case.bias.grad is None
