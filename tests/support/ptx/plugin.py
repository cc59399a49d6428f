"""The kernel tests on compiled code: `pytest --ptx sm_86`.

Kernels are compiled for the architecture and executed here, through the same `lorasb.backend("triton")` on CPU tensors.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from .allocations import Tracker
from .faults import KernelError
from .launch import Compiled, FakeDriver, Report, compile_launch, execute, orders_of

MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
ARCHITECTURES = tuple(MULTIPROCESSORS)


class Executor:
    """Compiles and executes launches on one architecture."""

    def __init__(self, arch: str) -> None:
        self.arch, self.driver, self.tracker = arch, FakeDriver(int(arch[3:])), Tracker()
        self.launches = self.programs = 0
        self.kernels: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.every_last = False  # run every launch in as many orders as it has programs
        self.last: Report | None = None  # launch
        self._seeds = itertools.count()

    def run(self, kernel: Any, grid: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """In place of `lorasb.kernels.launcher.run`."""
        from lorasb.kernels.launcher import Launch

        launch = Launch(kernel, grid, arguments, options)
        compiled = self.compile(launch)
        before = self.last if options.get("launch_pdl") else None
        report = execute(launch, compiled, orders_of(grid, next(self._seeds), self.every_last), self.tracker, before)
        self.last = report
        self.launches += 1
        self.programs += report.programs
        self.counts.update(report.counts)

    def bind(self, launch: Any) -> Any:
        """In place of `lorasb.kernels.prepared_launch.bind`: a prepared launch, executed with the tensors it is given."""
        call = launch.call
        recorded = specialized(call.kernel, call.arguments, call.options)

        def raw(stream: int, values: tuple[Any, ...], tensors: Any) -> None:
            arguments = launch.arguments(tensors, values[-1])
            if specialized(call.kernel, arguments, call.options) != recorded:
                raise KernelError(f"{call.kernel.__name__} is compiled for other arguments than it was prepared with")
            self.run(call.kernel, call.grid, arguments, call.options)

        return raw

    def compile(self, launch: Any) -> Compiled:
        """The kernel of a launch; Triton keeps what it compiled."""
        compiled = compile_launch(launch, self.driver)
        self.kernels.add(compiled.ptx)
        return compiled

    def summary(self) -> str:
        """One line."""
        steps = sum(self.counts.values())
        return (
            f"executed as compiled for {self.arch}: {self.launches} launches of {len(self.kernels)} kernels, "
            f"{self.programs} programs, {steps:,} instructions of {len(self.counts)} kinds"
        )


def specialized(kernel: Any, arguments: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """What Triton compiles a kernel for: a type for each argument, and what is known of its value."""
    *_, binder = kernel.device_caches[0]
    return list(binder(**arguments, **options)[1])


def install(arch: str) -> Executor:
    """Let `backend("triton")` execute compiled kernels on CPU tensors, from now on."""
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"--ptx knows {', '.join(ARCHITECTURES)}, got {arch!r}")
    from dataclasses import replace

    from lorasb.backends import triton as backend
    from lorasb.kernels import launcher, plan, prepared_launch
    from lorasb.ops import registry

    executor = Executor(arch)
    prepared_launch.driver.set_active(executor.driver)  # and stays so: without a card there is no other
    launcher.run = executor.run  # type: ignore[attr-defined]
    prepared_launch.bind = executor.bind  # type: ignore[attr-defined]
    backend._device = lambda device: (arch, MULTIPROCESSORS[arch])  # type: ignore[assignment]
    registry._missing["triton"] = lambda: None
    choose = plan.choose

    def fused(shape: Any, name: str, sms: int) -> Any:
        """The tables' choice, on the path that has kernels to execute, as the interpreter's default is."""
        return replace(choose(shape, name, sms), path="fused")

    plan.choose = fused  # type: ignore[assignment]
    return executor
