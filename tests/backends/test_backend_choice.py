"""The requested backend computes a call, within its block and its thread. Where kernels fail or are missing, `auto`
computes in eager torch and warns once; `triton` raises.
"""

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import pytest
import reference
import tolerances
import torch
from calls import operands_of
from lines import one_line
from processes import python
from torch._subclasses import FakeTensorMode

import lorasb
from lorasb.backends import eager
from lorasb.backends import triton as fused
from lorasb.backends.autotune import WrongResultError
from lorasb.functional import lora_sb_linear
from lorasb.kernels import linear as launch
from lorasb.ops import registry
from lorasb.ops.calls import Operands
from lorasb.ops.registry import current_backend


def test_the_forward_decides_for_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "SMALL_BYTES", 0)
    case = reference.make_case((5,), 24, 20, 4, torch.float32)
    core = case.core.requires_grad_(True)
    with lorasb.backend("eager"):
        y = lora_sb_linear(case.x, case.weight, case.a, core, case.b)
        with FakeTensorMode(allow_non_fake_inputs=True):  # wrapped tensors go to the op itself
            traced = lora_sb_linear(case.x, case.weight, case.a, core, case.b)
    assert y.grad_fn.kernels.backward is eager.eager_backward
    assert "linear_eager" in type(traced.grad_fn).__name__


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


auto = fused.or_eager(fused.forward, eager.eager_forward)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Operands]:
    c = reference.make_case((20,), 24, 16, 4, dtype)
    return c.x, operands_of(c)


@pytest.fixture(autouse=True)
def forget_broken_kernels() -> Iterator[None]:
    """Forget which kernels are broken after each test."""
    yield
    fused._broken.clear()


REFUSED = RuntimeError("ptxas: no such instruction")


def break_kernels(monkeypatch: pytest.MonkeyPatch, error: Exception = REFUSED) -> None:
    monkeypatch.setattr(launch, "launch", Mock(side_effect=error))


@pytest.mark.parametrize("error", [REFUSED, WrongResultError("y differs from torch's by up to 3")])
def test_auto_computes_in_eager_and_says_why_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernels(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=rf"{type(error).__name__}: {error}.*eager torch computes instead"):
        found = auto(*arguments())
    tolerances.check_equal(found, eager.eager_forward(*arguments()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tolerances.check_equal(auto(*arguments()), found)


def test_a_failure_stays_with_its_kernel_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other shapes and other kernels are still tried: they may run."""
    with monkeypatch.context() as patch:
        break_kernels(patch)
        with pytest.warns(RuntimeWarning, match=r"for calls like this one \(forward, 24 features, torch\.float32\)"):
            auto(*arguments())
    taken: list[str] = []
    real = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **k: (taken.append("kernel"), real(*a, **k)))
    auto(*arguments())
    assert not taken  # the same call runs in eager torch directly
    x, operands = arguments()
    auto(torch.cat((x, x)), operands)  # row counts up to the same power of two share a plan; this one is larger
    assert len(taken) == 2
    dy, u = torch.randn(20, 16), torch.randn(20, 4)
    fused.or_eager(fused.backward, eager.eager_backward)([dy], [u], operands, True, True)
    assert len(taken) == 4


NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(NO_COMPILER),
        subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]),
        ImportError("cannot import name 'driver' from 'triton.runtime'"),
    ],
    ids=["no compiler", "no headers", "a name that moved"],
)
def test_what_stops_all_kernels_is_said_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not repeated per kernel and shape. Where Triton's names moved, lorasb's modules fail to import, too."""
    if isinstance(error, ImportError):
        monkeypatch.setattr(fused, "_kernels", Mock(side_effect=error))
        monkeypatch.setitem(sys.modules, "lorasb.kernels.prepared_linear", None)
    break_kernels(monkeypatch, error)
    x, operands = arguments()
    with one_line(r"do not run here .*: eager torch .*C compiler.*Triton 3\.6 to"):
        for rows in (x, torch.cat((x, x))):
            ys = auto(rows, operands)
            tolerances.check_equal(ys, eager.eager_forward(rows, operands))
            fused.or_eager(fused.backward, eager.eager_backward)(ys[:1], ys[1:], operands, True, True)


def test_without_tmas_names_cublas_takes_its_place() -> None:
    """In a process whose Triton lacks TMA's names."""
    script = """
import triton.language.extra.cuda as cuda, triton.tools.tensor_descriptor as tools
descriptor = tools.TensorDescriptor
del cuda.gdc_wait, cuda.gdc_launch_dependents, tools.TensorDescriptor
import torch
from dataclasses import replace
from lorasb.compat.triton import has_tma
from lorasb.kernels import launcher, linear, plan
assert not has_tma()
tools.TensorDescriptor = descriptor  # which the interpreter reads
torch.manual_seed(0)
members = linear.Members([torch.randn(48, 64).half()], [torch.randn(8, 64).half()], [torch.randn(8, 8)],
                         [torch.randn(48, 8).half()], [None], [1.0])
chosen = replace(plan.choose(plan.Shape("forward", "fp16", 32, 64, 48, 8), plan.INTERPRETER, 1), path="tma")
with launcher.observed() as launches:
    linear.forward(torch.randn(32, 64).half(), members, chosen)
print([one.name for one in launches])
"""
    assert python("-c", script).strip() == "['prep_forward']"


def test_auto_takes_the_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(auto(*arguments())[0], fused.forward(*arguments())[0])
    monkeypatch.setattr(fused, "forward", None)
    assert torch.equal(auto(*arguments(torch.float64))[0], eager.eager_forward(*arguments(torch.float64))[0])


def test_an_explicit_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernels(monkeypatch)
    c = reference.make_case((20,), 24, 16, 4, torch.float32)
    with lorasb.backend("triton"), pytest.raises(RuntimeError, match="ptxas: no such instruction"):
        lora_sb_linear(c.x, c.weight, c.a, c.core, c.b)
    assert not fused._broken


FAULT = r"fault of an earlier kernel.*CUDA_LAUNCH_BLOCKING=1"
CAPTURED = "call the model once with the same shapes before capturing"


@pytest.mark.parametrize(
    ("kind", "said", "raised", "message"),
    [
        (IndexError, "expected index in [-1, 3)", IndexError, "expected index"),
        (torch.OutOfMemoryError, "CUDA out of memory", torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "Triton Error [CUDA]: an illegal memory access was encountered", RuntimeError, FAULT),
        (RuntimeError, "CUDA error: device-side assert triggered", RuntimeError, FAULT),
        (RuntimeError, "CUDA error: unspecified launch failure", RuntimeError, FAULT),
        (RuntimeError, "CUDA error: misaligned address", RuntimeError, FAULT),
        (RuntimeError, "CUDA error: uncorrectable ECC error encountered", RuntimeError, FAULT),
        (RuntimeError, "operation not permitted when stream is capturing", fused.CaptureError, CAPTURED),
    ],
    ids=["index", "memory", "access", "assert", "launch", "address", "ECC", "capture"],
)
def test_what_eager_torch_would_not_survive_is_raised(
    kind: type[Exception], said: str, raised: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernels(monkeypatch, kind(said))
    monkeypatch.setattr(fused, "is_capturing", lambda: raised is fused.CaptureError)
    with pytest.raises(raised, match=message):
        auto(*arguments())
    assert not fused._broken


def test_a_backward_by_eager_keeps_the_mask_of_a_forward_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a linear y, <dy, y(x)> = <dx, x>, but only if forward and backward use the same mask."""
    case = replace(reference.make_case((20,), 24, 16, 4, torch.float32, bias=False), weight=None)
    x, core, operands = case.x, case.core, operands_of(case, dropout=0.5, seeds=torch.tensor([3]))
    y, u = fused.forward(x, operands)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    break_kernels(monkeypatch)
    backward = fused.or_eager(fused.backward, eager.eager_backward)
    for _ in range(2):  # the call that fails, and a later one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            dx, dcore = backward([dy], [u], operands, True, True)
        tolerances.check((dx * x).sum(), (dy * y).sum(), tolerances.fp32(2000))
        tolerances.check((dcore * core).sum(), (dy * y).sum(), tolerances.fp32(2000))


def test_without_gpu_and_interpreter_triton_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.unavailable("triton") is None
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        with (
            pytest.raises(RuntimeError, match=r"'triton' is not available: there is no CUDA GPU"),
            lorasb.backend("triton"),
        ):
            pass
        with pytest.raises(ValueError, match=r"expected a CUDA tensor, got one on cpu: backend\('auto'\) takes it"):
            fused.forward(*arguments())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed: pip install triton"), lorasb.backend("triton"):
        pass
