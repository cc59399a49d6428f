"""Compare prepared launches with those of Triton's own launcher, on a libcuda that records (`recording_cuda.c`).

    python -m tests.support.launch_arguments LIBRARY [--arch sm_86]

CPU tensors replace GPU tensors, and no kernel runs. Each kind of call must launch the same kernels in the same order,
with the same grid, block, shared memory, stream and attributes, and every parameter byte for byte. Prints a JSON
object: Triton's version, the number of launches, the differences, and the number of differences after a number or an
address of every prepared launch was changed.
"""

import argparse
import ctypes
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from benchmarks.kernels.host_time import by_tma
from benchmarks.kernels.static_report import specialization
from lorasb.backends import backend, cpp
from lorasb.backends import triton as kernels
from lorasb.compat import triton as private
from lorasb.functional import lora_sb_linear_group
from lorasb.kernels import prepared_linear
from lorasb.kernels.launcher import Launch, observed
from tests.support.reference import make_case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Pointers that a launch does not use in these calls: the two launchers pass different tensors for them.
UNUSED = ("partial", "counters", "dcores", "us", "biases", "t0")
LEAST_ADDRESS = 1 << 32  # smaller 64-bit parameters are numbers


class Case(NamedTuple):
    """A forward and backward of layers that read the same x."""

    x: tuple[int, ...]
    out: tuple[int, ...]
    r: int
    bias: bool
    dropout: float
    dtype: torch.dtype
    by_tma: bool = False


CASES = (
    Case((8, 512), (512,), 96, False, 0.0, BF16),
    Case((40, 512), (256,), 64, True, 0.0, BF16),
    Case((2, 300, 512), (512,), 96, False, 0.0, FP16),
    Case((2, 300, 512), (512, 128, 128), 96, False, 0.0, BF16),
    Case((77, 123), (59,), 17, True, 0.0, FP32),
    Case((300, 512), (512,), 96, False, 0.05, BF16),
    Case((4, 600, 1024), (1024, 512, 512), 64, True, 0.05, BF16),
)
TMA_CASES = (  # on sm_90
    Case((2, 300, 512), (512,), 96, True, 0.0, BF16, True),
    Case((2, 300, 512), (512, 128, 128), 96, False, 0.0, FP16, True),
    Case((300, 512), (512,), 96, False, 0.05, BF16, True),
)


class Recorded(NamedTuple):
    """One launch."""

    kernel: str
    shape: tuple[str, ...]  # grid, block, shared memory, stream, attributes
    parameters: list[tuple[str, str]]  # (size, name of an address or value)


def recorded(library: ctypes.CDLL, known: dict[int, str]) -> list[Recorded]:
    """Return and forget the launches so far; addresses of the call's tensors by name, others as "new"."""
    launches = []
    for line in library.recorded_launches().decode().splitlines():
        kernel, *shape, parameters = line.split("|")
        found = []
        for size, text in (one.split(":") for one in parameters.strip(",").split(",")):
            value = int(text, 16) & (1 << 8 * int(size.split("-")[0])) - 1
            is_address = size.startswith(("8", "128")) and value >= LEAST_ADDRESS
            found.append((size, known.get(value, "new") if is_address else str(value)))
        launches.append(Recorded(kernel, tuple(shape), found))
    library.forget_launches()
    return launches


def parameter_names(launch: Launch) -> list[str]:
    """Names of the parameters that reach the kernel, in order."""
    names = [
        one
        for name, kind in specialization(launch)[0].items()
        for one in names_of(name, kind if isinstance(kind, tuple) else (kind,))
    ]
    return [*names, "global_scratch", "profile_scratch"]


def names_of(name: str, kind: Any) -> list[str]:
    """Names of an argument's parameters: of a tuple's members, or of a descriptor's map, shape and strides."""
    if isinstance(kind, tuple):
        return [one for i, member in enumerate(kind) for one in names_of(f"{name}{i}", member)]
    if kind.startswith("tensordesc"):
        return [name, *(f"{name}.{part}" for part in ("rows", "columns", "row_stride", "column_stride"))]
    return [] if kind == "constexpr" else [name]


def call_of(case: Case, library: ctypes.CDLL) -> Callable[[], list[Recorded]]:
    """A function that computes the case and returns its launches."""
    *shape, n = case.x
    layers = [make_case((*shape,), n, m, case.r, case.dtype, case.bias, seed=j) for j, m in enumerate(case.out)]
    weights, a, cores, b, dys = ([getattr(one, name) for one in layers] for name in ("weight", "a", "core", "b", "dy"))
    biases = [one.bias for one in layers if one.bias is not None]
    x = layers[0].x
    named = {"x": [x], "W": weights, "A": a, "B": b, "R": cores, "bias": biases, "dy": dys}
    known = {t.data_ptr(): f"{name}{i}" for name, tensors in named.items() for i, t in enumerate(tensors)}
    trained = [tensor.requires_grad_() for tensor in (x, *cores)]

    def run() -> list[Recorded]:
        torch.manual_seed(3)
        library.forget_launches()
        ys = lora_sb_linear_group(x, weights, a, cores, b, biases, [0.7] * len(cores), dropout=case.dropout)
        torch.autograd.grad(ys, trained, dys)
        return recorded(library, known)

    return run


def lines(calls: list[Recorded], launches: list[Launch]) -> list[str]:
    """The compared properties of launches, one per line."""
    found = []
    for one, launch in zip(calls, launches, strict=True):
        found.append(f"{one.kernel}: {one.shape}")
        named = zip(parameter_names(launch), one.parameters, strict=True)
        found += [f"{one.kernel} {name}: {value}" for name, value in named if not name.startswith(UNUSED)]
    return found


def compare(case: Case, library: ctypes.CDLL) -> tuple[int, list[str]]:
    """Number of launches of a case, and what differs."""
    if case.by_tma:
        with by_tma():
            return compare(case._replace(by_tma=False), library)
    run = call_of(case, library)
    run()  # compiles and prepares
    prepared, again = run(), run()
    with mock.patch.object(prepared_linear, "_is_ready", return_value=False), observed() as launches:
        ordinary = run()
    pairs = zip(lines(prepared, launches), lines(ordinary, launches), strict=True)
    found = [f"{mine} for {theirs}" for mine, theirs in pairs if mine != theirs]
    return len(ordinary), found + ([] if prepared == again else ["a repetition differs from the one before"])


def compare_all(library: ctypes.CDLL, arch: str) -> tuple[int, list[str]]:
    """Number of launches of all cases, and what differs."""
    cases = CASES + TMA_CASES if arch == "sm_90" and private.has_tma() else CASES
    found = {case: compare(case, library) for case in cases}
    differing = [f"{case}: {one}" for case, (_, those) in found.items() for one in those]
    return sum(count for count, _ in found.values()), differing


def use_driver(library: ctypes.CDLL, arch: str) -> None:
    """Make Triton's own driver launch on the recording libcuda."""
    capability = divmod(int(arch[3:]), 10)
    library.recorded_launches.restype = ctypes.c_char_p
    library.set_capability(*capability)
    recording = CudaDriver()
    recording.get_current_device = lambda: 0
    recording.get_current_stream = lambda _: 0
    recording.set_current_device = lambda _: None
    recording.get_device_capability = lambda *_: capability
    driver.set_active(recording)


def faulty(bind: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `compat.triton.launcher` to add one to the first number of each launch, by TMA 16 to the first address."""

    def launcher(found: Any, grid: int, take: Any, constants: tuple[Any, ...]) -> Any:
        if found.name == "tma_gemm":  # its numbers are compiled in
            return bind(found, grid, lambda values: take((values[0] + 16, *values[1:])), constants)
        first = next(i for i, value in enumerate(constants) if type(value) is int)
        return bind(found, grid, take, (*constants[:first], constants[first] + 1, *constants[first + 1 :]))

    return launcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--arch", default="sm_86")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    library = ctypes.CDLL(str(options.library), mode=ctypes.RTLD_GLOBAL)
    use_driver(library, options.arch)
    with (
        mock.patch.object(kernels, "architecture", return_value=(options.arch, 84)),
        mock.patch.object(kernels, "interpreting", return_value=True),
        # skips the base's products: each takes seconds on a processor without bf16, and nothing reads their values
        mock.patch.object(torch, "mm", lambda *factors, out: out),
        mock.patch.object(torch.Tensor, "addmm_", lambda y, *factors: y),
        backend("triton"),
    ):
        total, found = compare_all(library, options.arch)
        prepared_linear.forget()
        with mock.patch.object(private, "launcher", faulty(private.launcher)):
            _, injected = compare_all(library, options.arch)
    versions = {"triton": triton.__version__, "extension": cpp.missing() is None}
    print(json.dumps(versions | {"launches": total, "differences": found, "injected": len(injected)}))


if __name__ == "__main__":
    main()
