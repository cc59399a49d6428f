"""The C++ kernels: loaded where they were built, for CPU tensors. Without them eager torch computes, and says so once.

The extension registers its own kernels with the dispatcher, under the ops of `cpp` and of `auto`; what is told here is
where they are, so that small calls reach them directly. Dense layers are the BLAS's products as eager composes them,
but for 16 bits where the processor does not multiply them: the extension widens W a panel at a time, as torch takes
several times as long forward and a hundred times as long backward. On AVX2 it serves large weights in fp32, too.
"""

from __future__ import annotations

import importlib.machinery
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.registry import backend_op, register_backend, register_loaded
from .eager import linear as eager

DISABLE = "LORASB_NO_CSRC"
CAP = "LORASB_MAX_CPU_ISA"
CAPS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE_WEIGHT = 1 << 21  # elements from which on the extension's product in fp32 is faster (two Zen 3 cores)
OPS = ("linear_quantized", "linear_quantized_backward", "dequantize", "gradient_add", "gradient_signs")
_reason: str | None = "not loaded yet"


def library() -> Path | None:
    """The extension's file, if there is one for this Python."""
    folder = Path(__file__).parents[1]
    found = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def missing() -> str | None:
    """Why the C++ kernels cannot run, or None where they can."""
    return _reason


def instruction_set() -> str:
    """The instruction set whose kernels run: "AMX", "AVX-512 with bf16", "AVX-512", "AVX2" or "portable"."""
    name: str = torch.ops.lorasb_csrc.instruction_set()
    return name


def instruction_sets() -> list[str]:
    """Those that this processor has, the best first."""
    names: list[str] = torch.ops.lorasb_csrc.instruction_sets()
    return names


def use_instruction_set(name: str) -> None:
    """Run the kernels of one instruction set, "" for the best.

    Raises:
        ValueError: this processor has not got it.
    """
    torch.ops.lorasb_csrc.use_instruction_set(name)
    _multiplies.cache_clear()


def serves(dtype: torch.dtype, *weights: Tensor | None) -> bool:
    """True if dense layers of these weights are the extension's on a CPU.

    Those are 16 bits that the processor does not multiply, and large weights in fp32 on AVX2, where two threads of the
    BLAS were slower.
    """
    if not _multiplies(dtype) or dtype != torch.float32:
        return _multiplies(dtype)
    return any(weight is not None and weight.numel() >= LARGE_WEIGHT for weight in weights)


@lru_cache
def _multiplies(dtype: torch.dtype) -> bool:
    """True if the extension's product is the one for a dtype, by the instruction set that runs; asked in every call."""
    return _reason is None and dtype in DTYPES and bool(torch.ops.lorasb_csrc.serves(dtype))


def _served(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The extension's kernel of that name where it serves the call, else torch's products; both take the same.

    An op's first arguments are x and W, or lists with one of each for every member of a group.
    """

    def call(x: Tensor | list[Tensor], weight: Tensor | list[Tensor] | None, *others: Any) -> Any:
        dtype = (x[0] if isinstance(x, list) else x).dtype
        served = serves(dtype, *(weight if isinstance(weight, list) else [weight]))
        return (getattr(torch.ops.lorasb_csrc, name).default if served else plain)(x, weight, *others)

    return call


forward = _served("dense_linear", eager.forward)
group_forward = _served("dense_group", eager.group_forward)
KERNELS = (
    ("linear", forward),
    ("linear_backward", _served("dense_linear_backward", eager.backward)),
    ("linear_group", group_forward),
    ("linear_group_backward", _served("dense_group_backward", eager.group_backward)),
)


def register() -> None:
    """Load the extension, which registers its kernels for the CPU."""
    global _reason
    _reason = _load()
    _multiplies.cache_clear()
    if _reason is not None:
        logging.getLogger("lorasb").info("C++ kernels: %s; eager torch computes on the CPU", _reason)
    if _reason is None:
        register_backend("cpp", KERNELS, ("CPU",))
    kernels = {op: _below_autograd(backend_op(op, "cpp")) for op in OPS}
    register_loaded("cpp", kernels | {"serve_quantized": backend_op("serve_quantized", "cpp")}, missing)


def _load() -> str | None:
    if os.environ.get(DISABLE) == "1":
        return f"{DISABLE}=1 leaves them out"
    cap = os.environ.get(CAP) or CAPS[0]
    if cap not in CAPS:
        raise ValueError(f"expected {CAP} to be one of {', '.join(CAPS)}, got {cap!r}")
    path = library()
    if path is None:
        return (
            "this build of lorasb has no C++ extension: install it where a C++ compiler is, with --no-build-isolation"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load, it was built for another torch ({error}): install lorasb again"
    return None


def _below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op's kernel, without its derivative: callers bring their own."""

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call
