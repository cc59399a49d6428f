"""What a prepared launch stores from its first call, and whether it passes the driver the arguments that Triton's own
launcher passes: with the installed Triton, and in `make test-all` every verified version in the folder LORASB_TRITONS.
Also the counters of arriving programs, which calls on the default stream share.
"""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import ROOT, TRITONS, python
from torch import Tensor

from lorasb.compat.triton import has_tma
from lorasb.kernels import operands, prepared_launch
from lorasb.kernels.block_sizes import PrepConfig
from lorasb.kernels.launcher import Launch
from lorasb.kernels.prepared_launch import NotPreparedError, Prepared, PreparedLaunch


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda that records launches, compiled here."""
    if shutil.which("cc") is None:
        pytest.skip("Triton's launcher needs a C compiler")
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, "-o", path, ROOT / "tests" / "support" / "recording_cuda.c"], check=True)
    return path


def compared(library: Path, *options: str, triton: Path | None = None, csrc: bool = True) -> dict[str, Any]:
    """Return what the comparison prints in a separate process; `csrc`: with the C++ extension, if it was built."""
    variables = {"TRITON_LIBCUDA_PATH": str(library.parent), "LORASB_NO_CSRC": "" if csrc else "1"}
    if triton is not None:
        variables |= {"PYTHONPATH": f"{triton}:{ROOT}", "TRITON_CACHE_DIR": str(library.parent / triton.name)}
    printed = python("-m", "tests.support.launch_arguments", library, *options, **variables)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("arch", "csrc", "launches"), [("sm_86", True, 27), ("sm_86", False, 27), ("sm_90", True, 38 if has_tma() else 23)]
)
def test_prepared_launches_pass_what_ordinary_ones_do(arch: str, csrc: bool, launches: int, library: Path) -> None:
    found = compared(library, "--arch", arch, csrc=csrc)
    assert csrc or not found["extension"]
    assert found["differences"] == []
    assert found["launches"] == launches
    assert found["injected"] >= launches  # wrong arguments are found


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("triton", TRITONS, ids=lambda path: path.name)
def test_with_every_verified_version(triton: Path, arch: str, library: Path) -> None:
    found = compared(library, "--arch", arch, triton=triton)
    assert found["triton"] == triton.name
    assert found["launches"] >= 20
    assert found["differences"] == []


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def prepared(tensors: list[Tensor], **arguments: object) -> Prepared:
    """Prepare a launch of a stub kernel that has only what preparing reads."""
    kernel = SimpleNamespace(params=[SimpleNamespace(name=name) for name in arguments], __name__="kernel")
    return Prepared([Launch(kernel, 1, arguments, PrepConfig(16, 16, 4, 1))], tensors)


def test_seeds_and_counters_are_those_of_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, the seed stays the number that was compiled in."""
    x, partial, counters = meta(4, 8), meta(100), meta(3, dtype=torch.int32)
    known = prepared([x], x=x, partial=partial, counters=counters, seeds=(0,), DROPOUT=False)
    taken: list[dict[str, Any]] = []

    def bind(launch: PreparedLaunch) -> Any:
        return lambda stream, values, tensors: taken.append(
            dict(zip(launch.call.arguments, launch.take(values + launch.constants), strict=True))
        )

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 0))
    monkeypatch.setattr(prepared_launch, "bind", bind)
    monkeypatch.setattr(prepared_launch, "driver", driver)
    for seed in (0, 5, 2**62):
        known.repeat([torch.zeros(4, 8), torch.zeros(known.scratch[0])], (seed,))
    assert [one["seeds"] for one in taken] == [(0,)] * 3
    assert len({one["counters"] for one in taken}) == 1


X, OTHER, THIRD = meta(4, 8), meta(4, 8), meta(4, 8)


@pytest.mark.parametrize(
    ("arguments", "tensors", "message"),
    [
        # a repetition would not redo a copy by the launcher (of rows that are not contiguous)
        ({"x": X, "v": OTHER}, [X], "v of kernel is a copy"),
        ({"xs": (X, THIRD)}, [X, OTHER, THIRD], "are not adjacent"),
    ],
    ids=["a copy", "tensors of one argument apart"],
)
def test_what_is_not_prepared(arguments: dict[str, Any], tensors: list[Tensor], message: str) -> None:
    with pytest.raises(NotPreparedError, match=message):
        prepared(tensors, **arguments, **dict.fromkeys(("partial", "counters"), meta(1)))


DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A simulated CUDA device, with tensors on the CPU."""
    default = object()
    state = SimpleNamespace(stream=default, capturing=False)

    def zeros(*size: Any, device: torch.device, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)

    streams = SimpleNamespace(
        is_current_stream_capturing=lambda: state.capturing,
        current_stream=lambda device: state.stream,
        default_stream=lambda device: default,
    )
    monkeypatch.setattr(operands, "torch", SimpleNamespace(zeros=zeros, int32=torch.int32, cuda=streams))
    operands.forget_counters()
    yield state
    operands.forget_counters()


def test_the_default_streams_are_kept_and_grow(cuda: SimpleNamespace) -> None:
    first = operands.counters(DEVICE, 10)
    assert operands.counters(DEVICE, 4096).data_ptr() == first.data_ptr()
    assert operands.counters(DEVICE, 5000).numel() >= 5000


@pytest.mark.parametrize("why", ["capturing", "another stream"])
def test_new_zeros_where_none_may_be_shared(cuda: SimpleNamespace, why: str) -> None:
    kept = operands.counters(DEVICE, 10)
    cuda.capturing = why == "capturing"
    if not cuda.capturing:
        cuda.stream = object()
    found = [operands.counters(DEVICE, 7) for _ in range(2)]
    assert [one.numel() for one in found] == [7, 7]
    assert not any(one.any() for one in found)
    assert len({one.data_ptr() for one in (kept, *found)}) == 3
