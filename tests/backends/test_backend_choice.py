"""Which backend computes a call: the one that is asked for, within its block and its thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from torch._subclasses import FakeTensorMode

import lorasb
from lorasb.backends import eager
from lorasb.functional import lora_sb_linear
from lorasb.ops import registry
from lorasb.ops.registry import current_backend


def test_the_forward_decides_for_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    core = case.core.requires_grad_(True)
    with lorasb.backend("eager"):
        y = lora_sb_linear(case.x, case.weight, case.a, core, case.b)
        with FakeTensorMode(allow_non_fake_inputs=True):  # what wraps tensors meets the op itself
            traced = lora_sb_linear(case.x, case.weight, case.a, core, case.b)
    assert y.grad_fn.kernels.backward is eager.eager_backward
    assert "linear_eager" in type(traced.grad_fn).__name__


def test_a_missing_backend_raises_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.missing, "cpp", lambda: "it is gone")
    with pytest.raises(RuntimeError, match="backend 'cpp' is not available: it is gone"), lorasb.backend("cpp"):
        pass


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda': expected one of auto, eager"), lorasb.backend("cuda"):
        pass


def test_the_environment_variable_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_environment", "")
    monkeypatch.setenv("LORASB_BACKEND", "eager")
    assert current_backend() == "eager"
    with lorasb.backend("auto"):
        assert current_backend() == "auto"
    monkeypatch.setenv("LORASB_BACKEND", "fast")
    assert current_backend() == "eager"  # read once
    monkeypatch.setattr(registry, "_from_environment", "")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        current_backend()


def test_leaving_a_block_restores_the_backend_around_it() -> None:
    with lorasb.backend("eager"):
        with lorasb.backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "eager"
    assert current_backend() == "auto"


def test_threads_do_not_disturb_each_other() -> None:
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
