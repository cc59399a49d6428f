"""Which floating dtype a device multiplies natively, and what another one costs there."""

from __future__ import annotations

import functools
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
CAPS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "LORASB_MAX_CPU_ISA")
# The instruction sets of oneDNN and of ATen that have no bf16 product.
ONEDNN_BELOW = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
ATEN_BELOW = ("default", "avx2")
# The shape [tokens, in, out] of the product that is timed: without bf16 products it takes about 0.1 s.
TIMED = (128, 512, 512)
AMPERE = (8, 0)

_told: set[torch.dtype] = set()


@dataclass(frozen=True)
class Precision:
    """A dtype by its torch name, and in words why it is the one for a device."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype itself."""
        return DTYPES[self.name]


def native(device: str = "cpu") -> Precision:
    """bfloat16 where `device` ("cpu" or "cuda") multiplies it natively, else float32, with the reason."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) >= AMPERE:
            return Precision("bfloat16", f"sm_{major}{minor} multiplies bfloat16")
        return Precision("float32", f"sm_{major}{minor} does not multiply bfloat16, which begins at sm_80")
    capped = _cap(os.environ)
    if capped is not None:
        return Precision("float32", capped)
    return _of_processor(_flags(), platform.machine())


def _cap(environment: Mapping[str, str]) -> str | None:
    """The variable that keeps torch from bf16 products, in words; None where none does."""
    onednn = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "")).upper()
    if onednn in ONEDNN_BELOW:
        return f"ONEDNN_MAX_CPU_ISA={onednn} leaves no bfloat16 products"
    aten = environment.get("ATEN_CPU_CAPABILITY", "").lower()
    if aten in ATEN_BELOW:
        return f"ATEN_CPU_CAPABILITY={aten} leaves no bfloat16 products"
    return None


def _of_processor(flags: frozenset[str], machine: str) -> Precision:
    """By the processor's flags, as far as torch takes them up."""
    if machine in ("aarch64", "arm64"):
        if "bf16" in flags:
            return Precision("bfloat16", "the processor has Arm's bf16 instructions")
        return Precision("float32", "the processor's flags have no bf16")
    for flag, known in (("amx_bf16", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        usable = getattr(torch.cpu, known, None)
        if flag in flags and usable is not None and usable():
            return Precision("bfloat16", f"the processor has {flag}, and torch uses it")
    return Precision("float32", "the processor has no bfloat16 products that torch uses (avx512_bf16, amx_bf16)")


def _flags() -> frozenset[str]:
    """The processor's flags, as Linux tells them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").split())


def processor_class() -> str:
    """The widest products of this CPU, and the caps that are set: what times on it are to be compared by."""
    flags, machine = _flags(), platform.machine()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
    if machine in ("aarch64", "arm64"):
        known = {"bf16": "Arm with bf16", "asimd": "Arm"}
    widest = next((name for flag, name in known.items() if flag in flags), machine)
    return ", ".join([widest, *(f"{name}={os.environ[name]}" for name in CAPS if os.environ.get(name))])


def resolve(wanted: str, device: str) -> Precision:
    """The dtype for "auto", or the one wanted by name, which is tried.

    Raises:
        ValueError: the device cannot multiply the dtype; the message says what to take.
    """
    best = native(device)
    if wanted == "auto":
        return best
    error = _trial(DTYPES[wanted], device)
    if error is not None:
        raise ValueError(f"--dtype {wanted}: this {device} cannot compute in it ({error}); take --dtype auto")
    return Precision(wanted, "asked for")


def _trial(dtype: torch.dtype, device: str) -> str | None:
    """Why a product in `dtype` fails on a device; None where it works."""
    if device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() < AMPERE:
        return "its compute capability is below 8.0"
    try:
        _seconds(dtype, (2, 8, 8), device)
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times float32's time torch takes in `dtype` on this CPU: f+b of a frozen linear layer, timed once."""
    _seconds(dtype, (8, 64, 64))  # libraries are loaded here, and by the first of the products in float32
    reference = min(_seconds(torch.float32, TIMED) for _ in range(3))
    return _seconds(dtype, TIMED) / reference


def _seconds(dtype: torch.dtype, shape: tuple[int, int, int], device: str = "cpu") -> float:
    """Seconds of one forward and backward to x; the random state is not touched."""
    tokens, n, m = shape
    with torch.enable_grad():
        x = torch.full((tokens, n), 0.5, dtype=dtype, device=device, requires_grad=True)
        weight = torch.full((m, n), 0.5, dtype=dtype, device=device)
        started = time.perf_counter()
        product = nn.functional.linear(x, weight)
        torch.autograd.grad(product, x, torch.ones_like(product))
    return time.perf_counter() - started


def slow_line(name: str) -> str | None:
    """One line, with a ratio timed now, where `name` is a 16-bit dtype that this CPU has no products for; else None."""
    if name == "float32" or (name == "bfloat16" and native().name == "bfloat16"):
        return None
    ratio = slowdown(DTYPES[name])
    if ratio < 1.5:
        return None
    return (
        f"{name} on this CPU: torch takes {ratio:.0f}x the time of float32 for forward and backward of a linear layer "
        "(timed just now); float32 is faster here: dtype=torch.float32, or --dtype auto of the command line"
    )


def notice(model: nn.Module) -> None:
    """Log, once a process and dtype, what a model's 16-bit weights cost on this CPU. Nothing is changed.

    Models on other devices, the meta device among them, and in other dtypes are not looked into further.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype in (torch.bfloat16, torch.float16):
            if parameter.dtype not in _told:
                _told.add(parameter.dtype)
                line = slow_line(str(parameter.dtype).removeprefix("torch."))
                if line is not None:
                    logging.getLogger("lorasb").warning(line)
            return
