"""Groups of dtypes, the floating-point dtype that a device multiplies natively, and the slowdown of other dtypes."""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)  # allowed for R
FLOATS = (*WIDE, *SIXTEEN_BIT)  # allowed for x, W, A and B
QUANTIZABLE = (torch.float32, *SIXTEEN_BIT)  # allowed for a weight before quantization and after dequantization
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# Environment variables that limit the instruction sets of oneDNN, of ATen and of our extension.
CAPS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "LORASB_MAX_CPU_ISA")
# Values of ONEDNN_MAX_CPU_ISA that exclude instructions for bf16 products.
ONEDNN_BELOW = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
AMPERE = (8, 0)  # the first compute capability with bf16 products
WITHOUT_FP64 = {"mps", "xpu"}  # device types; Apple's GPUs and some of Intel's, whose factorizations run on the CPU

_warned_dtypes: set[torch.dtype] = set()


def factorable(tensor: Tensor) -> Tensor:
    """Return the tensor, on the CPU if its device has no fp64 (nor most factorizations)."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FP64 else tensor


def double(tensor: Tensor) -> Tensor:
    """Return the tensor in fp64, on the CPU if its device has none."""
    return factorable(tensor).double()


class Precision(NamedTuple):
    """A dtype by its torch name, and the reason in words why it suits a device."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def native(device: str = "cpu") -> Precision:
    """bfloat16 if `device` ("cpu" or "cuda") multiplies it natively, else float32; with the reason."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) >= AMPERE:
            return Precision("bfloat16", f"sm_{major}{minor} multiplies bfloat16")
        return Precision("float32", f"sm_{major}{minor} does not multiply bfloat16, which needs sm_80")
    # DNNL_MAX_CPU_ISA is oneDNN's former name of the variable, which it still reads.
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if onednn in ONEDNN_BELOW:
        return Precision("float32", f"ONEDNN_MAX_CPU_ISA={onednn} leaves no bfloat16 products")
    aten = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    if aten in ("default", "avx2"):
        return Precision("float32", f"ATEN_CPU_CAPABILITY={aten} leaves no bfloat16 products")
    flags = _flags()
    if platform.machine() in ("aarch64", "arm64"):
        if "bf16" in flags:
            return Precision("bfloat16", "the processor has Arm's bf16 instructions")
        return Precision("float32", "the processor's flags have no bf16")
    # torch asks the system as well as the processor: a kernel or hypervisor may not allow AMX tiles.
    for flag, query in (("amx_bf16", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        is_supported = getattr(torch.cpu, query, None)
        if flag in flags and is_supported is not None and is_supported():
            return Precision("bfloat16", f"the processor has {flag}, and torch uses it")
    return Precision("float32", "the processor has no bfloat16 products that torch uses (avx512_bf16, amx_bf16)")


def _flags() -> frozenset[str]:
    """Return the processor's flags, from Linux's /proc/cpuinfo (x86: flags, Arm: Features); empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())  # of the first core


def processor_class() -> str:
    """The widest matrix instructions of this CPU and the caps in effect; only times of one class are comparable."""
    flags, machine = _flags(), platform.machine()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
    if machine in ("aarch64", "arm64"):
        names = {"bf16": "Arm with bf16", "asimd": "Arm"}
    widest = next((name for flag, name in names.items() if flag in flags), machine)
    return ", ".join([widest, *(f"{name}={os.environ[name]}" for name in CAPS if os.environ.get(name))])


def resolve(name: str, device: str) -> Precision:
    """The native dtype for "auto", else the named one; a ValueError if the device cannot multiply it."""
    if name == "auto":
        return native(device)
    try:
        # Older GPUs emulate bf16: the product would not fail, but be slow.
        if device == "cuda" and name == "bfloat16" and torch.cuda.get_device_capability() < AMPERE:
            raise RuntimeError("its compute capability is below 8.0")
        _seconds(DTYPES[name], (2, 8, 8), device)
    except (RuntimeError, TypeError) as error:
        found = str(error).splitlines()[0]
        raise ValueError(f"--dtype {name}: this {device} cannot compute in it ({found}); take --dtype auto") from None
    return Precision(name, "asked for")


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of a frozen linear's forward and backward in `dtype` on this CPU, relative to float32's; timed once."""
    shape = (128, 512, 512)  # about 0.1 s without bf16 instructions
    _seconds(dtype, (8, 64, 64))  # warm-up: the first product of a dtype loads libraries
    reference = min(_seconds(torch.float32, shape) for _ in range(3))  # its first run is a warm-up, too
    return _seconds(dtype, shape) / reference


def _seconds(dtype: torch.dtype, shape: tuple[int, int, int], device: str = "cpu") -> float:
    tokens, n, m = shape
    # enable_grad, as callers may be under no_grad; constants, so that the random state is not touched.
    with torch.enable_grad():
        x = torch.full((tokens, n), 0.5, dtype=dtype, device=device, requires_grad=True)
        weight = torch.full((m, n), 0.5, dtype=dtype, device=device)
        started = time.perf_counter()
        product = nn.functional.linear(x, weight)
        torch.autograd.grad(product, x, torch.ones_like(product))
    return time.perf_counter() - started


def slowdown_message(name: str) -> str | None:
    """One line with the measured slowdown, if `name` is a 16-bit dtype that is slow on this CPU; else None."""
    if name == "float32" or (name == "bfloat16" and native().name == "bfloat16"):
        return None
    ratio = slowdown(DTYPES[name])
    if ratio < 1.5:
        return None
    return (
        f"{name} on this CPU: torch takes {ratio:.0f}x the time of float32 for forward and backward of a linear layer "
        "(timed just now); float32 is faster here: dtype=torch.float32, or --dtype auto of the command line"
    )


def warn_if_slow(model: nn.Module) -> None:
    """Log a warning, once per process and dtype, if the first 16-bit parameter's dtype is slow on this CPU."""
    dtypes = (p.dtype for p in model.parameters() if p.device.type == "cpu" and p.dtype in SIXTEEN_BIT)
    dtype = next(dtypes, None)
    if dtype is not None and dtype not in _warned_dtypes:
        _warned_dtypes.add(dtype)
        message = slowdown_message(str(dtype).removeprefix("torch."))
        if message is not None:
            logging.getLogger("lorasb").warning(message)
