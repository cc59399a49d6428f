"""Registry of ops and backends: op definitions, kernel registration and the current backend. Also the ops without a
derivative, and the packed words that `gradient_signs` returns: boolean matrices, 32 columns per int32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Operands

Function = Callable[..., Any]  # an op or a kernel; the schema defines its arguments
Forward = Callable[[Tensor, Operands], Sequence[Tensor]]  # (x, operands) -> the y_j, then the u_j
# (dys, us, operands, need_dx, need_dcores) -> dx, then the dR_j
Backward = Callable[[list[Tensor], list[Tensor], Operands, bool, bool], Sequence[Tensor]]
BACKENDS = ("auto", "eager", "cpp", "triton")
ENVIRONMENT_VARIABLE = "LORASB_BACKEND"

library = torch.library.Library("lorasb", "DEF")
_current: ContextVar[str] = ContextVar("lorasb_backend", default="")  # set by `backend`; empty: use LORASB_BACKEND
# The same for torch.compile, which cannot trace a ContextVar but guards on globals: the latest choice of any thread.
_latest = ""
_from_environment = ""  # value of LORASB_BACKEND, once read
# By backend that may be unavailable: returns the reason why it cannot run here, or None.
missing: dict[str, Callable[[], str | None]] = {}


def op_name(op: str, backend: str) -> str:
    return op if backend == "auto" else f"{op}_{backend}"


def backend_op(op: str, backend: str) -> Function:
    return getattr(torch.ops.lorasb, op_name(op, backend)).default


# Ops exist per backend and for `auto`, so that PyTorch's dispatcher chooses: `lorasb::adapted_linear` runs the kernel
# for x's device, else eager's; `lorasb::adapted_linear_cpp` runs only that backend's, and raises without one.
def define(
    name: str,
    schema: str,
    fake: Function,
    derivative: Callable[[str], Function] | None = None,  # maps an owner to its op's formula
    setup: Function | None = None,  # of the formula: saves what it needs
) -> None:
    """Define an op for `auto` and every backend, with its fake kernel, which returns empty tensors, and its formula."""
    for owner in BACKENDS:
        op = op_name(name, owner)
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"lorasb::{op}", fake, lib=library)
        if derivative is not None:
            torch.library.register_autograd(f"lorasb::{op}", derivative(owner), setup_context=setup, lib=library)


class Kernels(NamedTuple):
    """A backend's kernels for the adapted linear and its backward op, all called with `Operands`."""

    forward: Forward
    backward: Backward
    backward_op: Backward


# By backend and device type: the kernels that the dispatcher chooses for an adapted linear of plain tensors.
direct_kernels: dict[tuple[str, str], Kernels] = {}


def backward_op(backend: str) -> Backward:
    op = backend_op("adapted_linear_backward", backend)
    return lambda dys, us, operands, *need: op(dys, us, *operands, *need)


def record(owner: str, keys: Sequence[str], forward: Forward, backward: Backward) -> None:
    """Record kernels as the dispatcher chooses them: those for one device win, in any order of registration."""
    for device in ("CPU", "CUDA"):
        place = owner, device.lower()
        if device in keys or ("CompositeExplicitAutograd" in keys and place not in direct_kernels):
            direct_kernels[place] = Kernels(forward, backward, backward_op(owner))


def unavailable(name: str) -> str | None:
    return missing[name]() if name in missing else None


def current_backend() -> str:
    """Return the innermost `backend(...)`, else LORASB_BACKEND at the first call, else "auto"."""
    chosen = _latest if torch.compiler.is_compiling() else _current.get()
    return chosen or _from_environment or _read_environment()


def _read_environment() -> str:
    """Read LORASB_BACKEND once: a look-up in every call would take a fifth of a small layer's time."""
    global _from_environment
    _from_environment = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto")
    return _from_environment


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    reason = unavailable(name)
    if reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}. backend('auto') uses what is available")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the layers inside the block on one backend; their backward uses it too, even outside of the block.

    The choice is local to the thread or asyncio task that makes it. Autograd runs backward on a GPU in its own threads:
    there a forward that gradient checkpointing recomputes uses LORASB_BACKEND.

    Args:
        name: "auto" (the fastest one available for the device), or "eager", "cpp" or "triton", which never fall back.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend is not available here; the message says why.
    """
    global _latest
    token = _current.set(_checked(name))  # raises before anything is changed
    _latest = name
    try:
        yield
    finally:
        _current.reset(token)
        _latest = _current.get()


WORD = 32  # columns: bit j of word w in a row is its column 32·w + j
SQUARES, ZEROS, BAD = 0, 1, 2  # indices into the third result of `gradient_signs`: Σ G², zeros, NaN or Inf entries


def words_of(columns: int) -> int:
    return -(-columns // WORD)


def pack_words(flags: Tensor) -> Tensor:
    """Pack booleans [m, n] into words [m, ceil(n / 32)], int32; bits beyond column n are 0."""
    m, n = flags.shape
    padded = words_of(n) * WORD
    if n % WORD:
        flags = torch.nn.functional.pad(flags, (0, padded - n))
    # Bytes first, then a view of four as one word: torch has no uint32 sums, and bit 31 would overflow int32's.
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    octets = (flags.reshape(m, padded // 8, 8).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def unpack_words(words: Tensor, columns: int, zero: float, one: float, dtype: torch.dtype) -> Tensor:
    """Unpack words [m, w] to a matrix [m, columns] with the value `zero` for 0 bits and `one` for 1 bits."""
    octets = words.contiguous().view(torch.uint8).int()  # embedding takes no uint8 indices
    values = torch.nn.functional.embedding(octets, _octet_table(zero, one, dtype, words.device))
    return values.flatten(1)[:, :columns]


@lru_cache
def _octet_table(zero: float, one: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight values that each byte unpacks to."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)[None, :]) & 1
    return torch.where(bits == 1, one, zero).to(device, dtype)


def _signs_fake(dy: Tensor, x: Tensor, total: Tensor | None, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
    words = x.new_empty((dy.shape[1], words_of(x.shape[1])), dtype=torch.int32)
    return words, torch.empty_like(words), x.new_empty((3,), dtype=torch.float64)


def _dequantize_fake(quant: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return quant[0].new_empty((rows, columns), dtype=dtype)


def _serve_fake(x: Tensor, quant: list[Tensor], layout: list[int], rows: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


# For `quant` and `layout` see `Operands`. Gradients are summed in a fixed order: results are bit-identical across runs.
# G [m, n] += dyᵀ x in fp32, with dy [M, m] and x [M, n]
define("gradient_add", "(Tensor dy, Tensor x, Tensor(a!) total, bool fresh) -> ()", lambda *_: None)
# The signs of G + dyᵀ x, packed 32 per word, and statistics
SIGNS = "(Tensor dy, Tensor x, Tensor(a!)? total, bool fresh) -> (Tensor, Tensor, Tensor)"
define("gradient_signs", SIGNS, _signs_fake)
DEQUANTIZE = "(Tensor[] quant, int[] layout, int rows, int columns, ScalarType dtype) -> Tensor"
define("dequantize", DEQUANTIZE, _dequantize_fake)
# y alone, for calls that record no gradient; takes `QuantizedWeight.layout()` and checks its arguments itself. Not all
# backends have it.
SERVE = (
    "(Tensor x, Tensor[] quant, int[] layout, int rows, int columns, Tensor? a, Tensor? core, Tensor? b, "
    "Tensor? bias, float scaling) -> Tensor"
)
define("serve_quantized", SERVE, _serve_fake)
