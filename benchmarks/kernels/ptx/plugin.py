"""The kernel tests on compiled code: `pytest --ptx sm_86`.

Kernels are compiled for the architecture and executed here, through the same `lorasb.backend("triton")` on CPU tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .launch import FakeDriver, compile_launch, execute, orders_of
from .program import KernelError

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}


class Executor:
    """Compiles and executes launches on one architecture."""

    def __init__(self, arch: str) -> None:
        self.arch, self.driver = arch, FakeDriver(int(arch[3:]))
        self.launches = self.programs = 0
        self.kernels: set[str] = set()
        self.every_last = False  # run every launch in as many orders as it has programs
        self.written: set[int] = set()  # storages that the last launch wrote
        self._seeds = itertools.count()

    def run(self, launch: Any) -> None:
        """Compile and execute a launch; replaces `lorasb.kernels.launcher.run`."""
        compiled = compile_launch(launch, self.driver)
        self.kernels.add(compiled.ptx)
        orders = orders_of(launch.grid, next(self._seeds), self.every_last)
        before = self.written if launch.options.get("launch_pdl") else ()
        self.written = execute(launch, compiled, orders, before)
        self.launches += 1
        self.programs += launch.grid

    def bind(self, launch: Any) -> Any:
        """Execute a prepared launch on the given tensors; replaces `lorasb.kernels.prepared_launch.bind`."""
        call = launch.call
        recorded = specialized(call.kernel, call.arguments, call.options)

        def raw(stream: int, values: tuple[Any, ...], tensors: Any) -> None:
            arguments = arguments_of(launch, tensors, values[-1])
            if specialized(call.kernel, arguments, call.options) != recorded:
                raise KernelError(f"{call.kernel.__name__} is compiled for other arguments than it was prepared with")
            self.run(call._replace(arguments=arguments))

        return raw

    def summary(self) -> str:
        """Summarize in one line."""
        kernels = f"{self.launches} launches of {len(self.kernels)} kernels"
        return f"executed as compiled for {self.arch}: {kernels}, {self.programs} programs"


def arguments_of(launch: Any, tensors: Sequence[Tensor], seeds: object) -> dict[str, Any]:
    """The arguments of a prepared launch by name, as in an ordinary one."""
    found = dict(launch.call.arguments)
    for name, place in launch.places.items():
        found[name] = _view(place, tensors)
    return found | ({"seeds": seeds} if found.get("DROPOUT") else {})


def _view(place: Any, tensors: Sequence[Tensor]) -> Any:
    """The argument that is a view into one of a call's tensors, a descriptor of one, or a tuple of them."""
    if type(place) is tuple:
        return tuple(_view(one, tensors) for one in place)
    tensor, like = tensors[place.index], place.like
    start = (tensor.storage_offset() * tensor.element_size() + place.offset) // like.element_size()
    found = torch.empty(0, dtype=like.dtype, device=tensor.device)
    found.set_(tensor.untyped_storage(), start, like.shape, like.stride())
    return found if place.descriptor is None else replace(place.descriptor, base=found)


def specialized(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """Return what Triton specializes a kernel on: each argument's type, and what is known about its value."""
    *_, binder = kernel.device_caches[0]
    return list(binder(**arguments, **options)[1])


def install(arch: str) -> Executor:
    """Let `backend("triton")` execute compiled kernels on CPU tensors, from now on."""
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"expected --ptx as one of {', '.join(MULTIPROCESSORS)}, got {arch!r}")
    from lorasb.backends import triton as backend
    from lorasb.kernels import launcher, plan, prepared_launch
    from lorasb.ops import registry

    executor = Executor(arch)
    prepared_launch.driver.set_active(executor.driver)  # permanently: without a card there is no other
    launcher.run = executor.run
    prepared_launch.bind = executor.bind
    backend.architecture = lambda device: (arch, MULTIPROCESSORS[arch])  # type: ignore[assignment]
    registry.missing["triton"] = lambda: None
    choose = plan.choose

    def fused(shape: Any, name: str, sms: int) -> Any:
        """The tables' choice on the path that has kernels to execute, which is also the interpreter's default."""
        return replace(choose(shape, name, sms), path="fused")

    plan.choose = fused
    return executor
