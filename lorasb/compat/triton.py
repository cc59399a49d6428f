"""Private names of Triton, to launch compiled kernels without its argument binding; imports triton at first use."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import Private, find

VERIFIED = "Triton 3.6 to 3.9"
FIRST, LAST = (3, 6), (3, 9)
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")  # of releases, of torch's nightly builds, for Windows
ORDINARY = "kernels are launched by Triton's own launcher, which takes 50 µs more per launch"
TMA_FROM = (3, 8)  # before, Triton's launcher takes no descriptors in tuples
NO_TMA = "cuBLAS multiplies"
NO_OVERLAP = f"launches run one after another; instead of TMA, {NO_TMA}"
PRIVATE = {
    "run": Private("triton.runtime.jit.JITFunction.run", "compiles without launching", ORDINARY),
    "compiled": Private(
        "triton.compiler.CompiledKernel.run",
        "launches by position; with `function` and `packed_metadata`",
        ORDINARY,
    ),
    "device_caches": Private("triton.runtime.jit.JITFunction().device_caches", "detects interpreted kernels", ORDINARY),
    "driver": Private("triton.runtime.driver.DriverConfig().active", "a device's stream", "prepared launches raise"),
    "launch_hooks": Private("triton.knobs.runtime.launch_enter_hook", "detects profilers of launches", ORDINARY),
    "TensorDescriptor": Private(
        "triton.tools.tensor_descriptor.TensorDescriptor", "TMA; `base`, `shape`, `strides`, `block_shape`", NO_TMA
    ),
    "gdc_wait": Private("triton.language.extra.cuda.gdc_wait", "overlapping launches", NO_OVERLAP),
    "gdc_launch_dependents": Private(
        "triton.language.extra.cuda.gdc_launch_dependents", "overlapping launches", NO_OVERLAP
    ),
}


@cache
def installed() -> tuple[int, int]:
    """The installed version (major, minor); (0, 0) without Triton."""
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            major, minor = re.findall(r"\d+", version(name))[:2]
            return int(major), int(minor)
    return 0, 0


@cache
def is_verified() -> bool:
    """True if prepared launches were tested with the installed version."""
    return FIRST <= installed() <= LAST


@cache
def has_tma() -> bool:
    """True if Triton launches the TMA kernel, and has the names that it uses."""
    return installed() >= TMA_FROM and find(PRIVATE["TensorDescriptor"]) is not None and _has_overlap()


@cache
def _has_overlap() -> bool:
    return all(find(PRIVATE[name]) is not None for name in ("gdc_wait", "gdc_launch_dependents"))


def omits_fences() -> bool:
    """True if loops feed wgmma by cp.async without fence.proxy.async, which PTX requires: Triton 3.6 on sm_90."""
    if installed() >= (3, 7):
        return False
    from triton.runtime import driver

    with suppress(RuntimeError):  # no GPU: kernels are only compiled
        return bool(driver.active.get_current_target().arch == 90)
    return False


@cache
def warn_once(text: str) -> None:
    """Warn, once in a process."""
    warnings.warn(text, stacklevel=3)


def is_compiled(kernel: object) -> bool:
    """True if Triton compiles this kernel; its interpreter, which takes no compiler options, runs it otherwise."""
    return hasattr(kernel, "device_caches")


def may_overlap(kernel: object) -> bool:
    """True if a kernel can begin before the previous one has ended: Triton compiles it, and has the instructions."""
    return _has_overlap() and is_compiled(kernel)


def may_repeat(kernel: object) -> bool:
    """True if launches of a kernel may be prepared: Triton compiles it, is verified, and nothing observes it."""
    if not is_compiled(kernel):
        return False
    if not is_verified():
        found = ".".join(map(str, installed()))
        warn_once(f"lorasb was tested with {VERIFIED}, and this is Triton {found}: {ORDINARY}")
        return False
    enter, leave = _runtime().launch_enter_hook, _runtime().launch_exit_hook
    # a profiler that added itself to Triton's chain, or a tool that replaced the chain
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        warn_once(f"another tool observes kernel launches (triton.knobs.runtime.launch_enter_hook): {ORDINARY}")
        return False
    return True


@cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def compiled(kernel: Any, grid: int, arguments: dict[str, object], options: dict[str, object]) -> Any:
    """Compile a kernel for these arguments, or find it where Triton keeps it, and load it onto the current device."""
    found = kernel.run(grid=(grid,), warmup=True, **arguments, **options)
    return found.result() if hasattr(found, "result") else found  # Triton's asynchronous compilation


class Descriptor:
    """The attributes of a TensorDescriptor that Triton's launcher reads, for a tensor of known address."""

    __slots__ = ("address", "block_shape", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, address: int, like: Any) -> None:
        self.address, self.shape, self.strides, self.block_shape = address, like.shape, like.strides, like.block_shape

    @property
    def base(self) -> Descriptor:
        return self

    def data_ptr(self) -> int:
        return self.address


def launcher(
    found: Any, grid: int, take: Callable[[tuple[object, ...]], tuple[object, ...]], constants: tuple[object, ...]
) -> Callable[[int, tuple[object, ...], object], None]:
    """A function of (stream, values, anything) that launches a kernel with take(values + constants)."""
    run, function, metadata = found.run, found.function, found.packed_metadata

    def launch(stream: int, values: tuple[object, ...], _: object) -> None:
        run(grid, 1, 1, stream, function, metadata, None, None, None, *take(values + constants))

    launch.compiled = found  # type: ignore[attr-defined]  # which unloads itself once nothing refers to it
    return launch
