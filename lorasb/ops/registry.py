"""Registry of ops and backends: definitions of ops, registration of kernels, and the current backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
_current: ContextVar[str] = ContextVar("lorasb_backend", default="")  # set by `backend`; empty: use LORASB_BACKEND
# The same for torch.compile, which cannot trace a ContextVar but guards on globals: the latest choice of any thread.
_latest = ""
_from_environment = ""  # value of LORASB_BACKEND, once read
# By backend that may not be there: returns the reason why it cannot run here, or None.
missing: dict[str, Callable[[], str | None]] = {}


def op_name(op: str, backend: str) -> str:
    return op if backend == "auto" else f"{op}_{backend}"


def backend_op(op: str, backend: str) -> Function:
    return getattr(torch.ops.lorasb, op_name(op, backend)).default


# Once per backend and once for `auto`, so that PyTorch's dispatcher chooses: `lorasb::adapted_linear` runs the kernel
# for x's device, else eager's; `lorasb::adapted_linear_cpp` runs that backend's alone, and raises without one.
def define(
    name: str,
    schema: str,
    fake: Function,
    derivative: Callable[[str], Function] | None = None,  # from an owner to its op's formula
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
    """A backend's kernels of the adapted linear, called on operands, and its backward op, called likewise."""

    forward: Forward
    backward: Backward
    backward_op: Backward


# By backend and type of device: the kernels that the dispatcher chooses for the adapted linear of plain tensors.
direct_kernels: dict[tuple[str, str], Kernels] = {}


def backward_op(backend: str) -> Backward:
    op = backend_op("adapted_linear_backward", backend)
    return lambda dys, us, operands, *need: op(dys, us, *operands, *need)


def record(owner: str, keys: Sequence[str], forward: Forward, backward: Backward) -> None:
    """Record kernels as the dispatcher chooses them: those for a device before those for all, in either order."""
    for device in ("CPU", "CUDA"):
        place = owner, device.lower()
        if device in keys or ("CompositeExplicitAutograd" in keys and place not in direct_kernels):
            direct_kernels[place] = Kernels(forward, backward, backward_op(owner))


def unavailable(name: str) -> str | None:
    return missing[name]() if name in missing else None


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
