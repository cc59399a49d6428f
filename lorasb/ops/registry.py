"""Registry of ops and backends: definitions of ops, registration of kernels, and the current backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Operands

Function = Callable[..., Any]  # an op or a kernel, whose arguments its schema names
Forward = Callable[[Tensor, Operands], Sequence[Tensor]]  # (x, operands) -> the y_j, then the u_j
# (dys, us, operands, need_dx, need_dcores) -> dx, then the dR_j
Backward = Callable[[list[Tensor], list[Tensor], Operands, bool, bool], Sequence[Tensor]]
BACKENDS = ("auto", "eager", "cpp", "triton")
ENVIRONMENT_VARIABLE = "LORASB_BACKEND"

library = torch.library.Library("lorasb", "DEF")
DIRECT = ("CPU", "CUDA")  # dispatch keys of devices whose kernels are called directly where nothing intercepts an op
# By such a key, then by op: the kernel that the dispatcher chooses for plain tensors there.
_kernels: dict[str, dict[str, Function]] = {key: {} for key in DIRECT}
_current: ContextVar[str] = ContextVar("lorasb_backend", default="")  # set by `backend`; empty: use LORASB_BACKEND
# The same for torch.compile, which cannot trace a ContextVar but guards on globals: the latest choice of any thread.
_latest = ""
_from_environment = ""  # value of LORASB_BACKEND, once read
# By backend: returns the reason why it cannot run here, or None. Registration replaces Triton's entry.
_missing: dict[str, Callable[[], str | None]] = {"triton": lambda: "this build of lorasb has no Triton kernels"}


def op_name(op: str, backend: str) -> str:
    return op if backend == "auto" else f"{op}_{backend}"


def backend_op(op: str, backend: str) -> Function:
    return getattr(torch.ops.lorasb, op_name(op, backend)).default


# Once per backend and once for `auto`, so that PyTorch's dispatcher chooses: `lorasb::adapted_linear` runs the kernel
# for x's device, else eager's; `lorasb::adapted_linear_cpp` runs that backend's alone, and raises without one.
def define(name: str, schema: str, fake: Function) -> None:
    """Define an op for `auto` and every backend, with its fake kernel, which returns empty tensors."""
    for owner in BACKENDS:
        library.define(op_name(name, owner) + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"lorasb::{op_name(name, owner)}", fake, lib=library)


class Kernel(NamedTuple):
    """A kernel of an op, as the dispatcher calls it, and as Python does without the dispatcher, if that differs."""

    op: Function
    direct: Function | None = None


def register_backend(
    name: str,
    kernels: dict[str, Kernel],
    keys: Sequence[str],
    auto: dict[str, Kernel] | None = None,  # kernels and keys of `auto`; those of the backend if None
    auto_keys: Sequence[str] | None = None,
    missing: Callable[[], str | None] | None = None,  # the reason why the backend cannot run here, or None if it can
) -> None:
    """Register a backend's kernels by op and dispatch key, under its own ops and those of `auto`."""
    of_auto = "auto", auto or kernels, keys if auto_keys is None else auto_keys
    for owner, table, dispatch_keys in ((name, kernels, keys), of_auto):
        for op, kernel in table.items():
            for key in dispatch_keys:
                library.impl(op_name(op, owner), kernel.op, key)
            _record(op_name(op, owner), kernel.direct or kernel.op, dispatch_keys)
    _missing[name] = missing or (lambda: None)


def _record(op: str, kernel: Function, keys: Sequence[str]) -> None:
    """Record by the dispatcher's precedence: a kernel for a device before one for all devices, in either order."""
    direct_kernels.cache_clear()
    for device, kernels in _kernels.items():
        if device in keys or ("CompositeExplicitAutograd" in keys and op not in kernels):
            kernels[op] = kernel


def register_loaded(name: str, kernels: dict[str, Function], missing: Callable[[], str | None]) -> None:
    """Record kernels that a loaded library has registered for the CPU, unless `missing` returns a reason."""
    _missing[name] = missing
    if missing() is None:
        for op, kernel in kernels.items():
            for owner in (name, "auto"):
                _record(op_name(op, owner), kernel, ("CPU",))


def direct_kernel(op: str, backend: str) -> Function | None:
    """The kernel that the dispatcher chooses for plain tensors on a CPU; None if there is none."""
    return _kernels["CPU"].get(op_name(op, backend))


class Kernels(NamedTuple):
    """A backend's kernels of the adapted linear, called on operands, and its backward op, called likewise."""

    forward: Forward
    backward: Backward
    backward_op: Backward


def backward_op(backend: str) -> Backward:
    op = backend_op("adapted_linear_backward", backend)
    return lambda dys, us, operands, *need: op(dys, us, *operands, *need)


@cache
def direct_kernels(backend: str, device_type: str) -> Kernels | None:
    """The kernels that the dispatcher chooses for the adapted linear of plain tensors; None if there are none."""
    table = _kernels.get(device_type.upper(), {})
    forward, backward = (table.get(op_name(op, backend)) for op in ("adapted_linear", "adapted_linear_backward"))
    if forward is None or backward is None:
        return None
    return Kernels(forward, backward, backward_op(backend))


def unavailable(name: str) -> str | None:
    return _missing[name]() if name in _missing else None


def current_backend() -> str:
    """The innermost `backend(...)`, else LORASB_BACKEND at the first call, else "auto"."""
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
        raise RuntimeError(f"backend {name!r} is not available: {reason}. backend('auto') takes what is there")
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
