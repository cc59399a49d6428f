"""Ops and backends: an op is defined once for all backends, each backend registers its kernels, one is in force.

Every backend has an op of its own beside the one that `auto` uses, so that PyTorch's dispatcher does the choosing:
`lorasb::linear` runs what is registered for x's device (eager where nothing else is), `lorasb::linear_eager` runs
eager and nothing else. A backend that registers no kernel raises; only `auto` falls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

BACKENDS = ("auto", "eager", "cpp", "triton")
ENVIRONMENT_VARIABLE = "LORASB_BACKEND"

library = torch.library.Library("lorasb", "DEF")
_on_cpu: dict[str, Callable[..., Any]] = {}  # what the dispatcher chooses for CPU tensors, by op
_current: ContextVar[str] = ContextVar("lorasb_backend", default="")  # of `backend`; empty: the environment decides
_latest = ""  # the same for torch.compile, which traces no ContextVar and guards a global: any thread's latest choice
_from_environment = ""  # LORASB_BACKEND, once it was read
_missing: dict[str, Callable[[], str | None]] = {
    "triton": lambda: "this build of lorasb has no Triton kernels",
}


def op_name(op: str, backend: str) -> str:
    """The name of a backend's version of an op, without the namespace."""
    return op if backend == "auto" else f"{op}_{backend}"


def backend_op(op: str, backend: str) -> Callable[..., Any]:
    """A backend's version of an op. "linear" returns (y, u) with u = x Aᵀ [M, r]."""
    return getattr(torch.ops.lorasb, op_name(op, backend)).default


def define(
    name: str,
    schemas: tuple[str, str],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    backward: Callable[[Callable[..., Any]], Callable[..., Any]],
    setup: Callable[..., None],
) -> None:
    """Define an op and its backward once for every backend.

    Args:
        name: of the op; its derivative is name_backward.
        schemas: of the two.
        fakes: shapes of their results.
        backward: from a backend's backward op to the function that autograd calls.
        setup: what autograd keeps.
    """
    for owner in BACKENDS:
        for op, schema, fake in zip((name, f"{name}_backward"), schemas, fakes, strict=True):
            library.define(op_name(op, owner) + schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"lorasb::{op_name(op, owner)}", fake, lib=library)
        function = backward(backend_op(f"{name}_backward", owner))
        torch.library.register_autograd(f"lorasb::{op_name(name, owner)}", function, setup_context=setup, lib=library)
        torch.library.register_autograd(f"lorasb::{op_name(f'{name}_backward', owner)}", _no_second, lib=library)


def define_plain(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define an op without a derivative, once for every backend."""
    for owner in BACKENDS:
        library.define(op_name(name, owner) + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"lorasb::{op_name(name, owner)}", fake, lib=library)


def _no_second(ctx: Any, *_: Any) -> None:
    raise RuntimeError("LoRA-SB's linear has no second derivative: call backward or autograd.grad once")


def register_backend(
    name: str,
    kernels: Sequence[tuple[str, Callable[..., Any]]],
    keys: Sequence[str],
    auto: Sequence[tuple[str, Callable[..., Any]]] | None = None,
    auto_keys: Sequence[str] | None = None,
    missing: Callable[[], str | None] | None = None,
) -> None:
    """Register a backend's kernels under its own ops and under those of `auto`.

    Args:
        name: of the backend.
        kernels: pairs of an op ("linear", "linear_backward", ...) and what computes it.
        keys: dispatch keys ("CPU", "CUDA", ...) at which they compute the backend's own ops.
        auto: what computes the ops of `auto`, where that is something else.
        auto_keys: dispatch keys for those, where they are others.
        missing: called to ask why the backend cannot run here; None, or a result of None, where it can.
    """
    for owner, pairs, where in (
        (name, kernels, keys),
        ("auto", auto or kernels, keys if auto_keys is None else auto_keys),
    ):
        for op, kernel in pairs:
            for key in where:
                library.impl(op_name(op, owner), kernel, key)
            if "CPU" in where or ("CompositeExplicitAutograd" in where and op_name(op, owner) not in _on_cpu):
                _on_cpu[op_name(op, owner)] = kernel
    _missing[name] = missing or (lambda: None)


def register_loaded(name: str, kernels: dict[str, Callable[..., Any]], missing: Callable[[], str | None]) -> None:
    """Tell of kernels that a loaded library has registered for the CPU, under the backend's ops and those of `auto`.

    Args:
        name: of the backend.
        kernels: how to call each, by op.
        missing: as in `register_backend`; where it gives a reason, nothing was registered.
    """
    _missing[name] = missing
    if missing() is None:
        for op, kernel in kernels.items():
            _on_cpu[op_name(op, name)] = _on_cpu[op_name(op, "auto")] = kernel


def cpu_kernel(op: str, backend: str) -> Callable[..., Any] | None:
    """What the dispatcher chooses for CPU tensors, if anything."""
    return _on_cpu.get(op_name(op, backend))


def unavailable(name: str) -> str | None:
    """Why a backend cannot run here, or None where it can."""
    return _missing[name]() if name in _missing else None


def current_backend() -> str:
    """The backend in force: of the innermost `backend(...)`, else of LORASB_BACKEND at the first call, else "auto"."""
    chosen = _latest if torch.compiler.is_compiling() else _current.get()
    return chosen or _from_environment or _read_environment()


def _read_environment() -> str:
    """Read LORASB_BACKEND, once: looking it up in every call would be a fifth of a small layer's time."""
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
    """Run the layers inside the block on one backend, backward included, wherever that backward runs.

    The choice belongs to the thread (or asyncio task) that made it: others are not disturbed. On a GPU autograd runs
    backward in threads of its own; a backward knows its forward's backend, but a forward that gradient checkpointing
    repeats there takes what LORASB_BACKEND says.

    Args:
        name: "auto" (the fastest that this device has), or "eager", "cpp" or "triton", which never fall back.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend is not available here; the message says why.
    """
    global _latest
    token = _current.set(_checked(name))
    _latest = name
    try:
        yield
    finally:
        _current.reset(token)
        _latest = _current.get()
