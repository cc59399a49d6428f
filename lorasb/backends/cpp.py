"""The C++ kernels: loaded where they were built, for CPU tensors. Without them eager torch computes, and says so once.

The extension registers its own kernels with the dispatcher, under the ops of `cpp` and of `auto`; what is told here is
where they are, so that small calls reach them directly. Dense layers need none of their own: what eager composes for
them are the BLAS's products, and it serves `cpp` too.
"""

from __future__ import annotations

import importlib.machinery
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import gradient_ops, quantised_ops  # noqa: F401  define the ops
from ..ops import backend_op, register_backend, register_loaded
from . import eager

DISABLE = "LORASB_NO_CSRC"
OPS = ("linear_quantised", "linear_quantised_backward", "dequantise", "gradient_add", "gradient_signs")
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


def register() -> None:
    """Load the extension, which registers its kernels for the CPU."""
    global _reason
    _reason = _load()
    if _reason is not None:
        logging.getLogger("lorasb").info("C++ kernels: %s; eager torch computes on the CPU", _reason)
    if _reason is None:
        register_backend("cpp", eager.KERNELS, ("CPU",), auto_keys=())
    kernels = {op: _below_autograd(backend_op(op, "cpp")) for op in OPS}
    register_loaded("cpp", kernels | {"serve_quantised": backend_op("serve_quantised", "cpp")}, missing)


def _load() -> str | None:
    if os.environ.get(DISABLE) == "1":
        return f"{DISABLE}=1 leaves them out"
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
