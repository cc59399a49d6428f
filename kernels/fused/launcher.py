"""Launching kernels, and observers of launches, from which tests and reports learn what is really launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..compat import triton as private
from .block_sizes import GemmConfig, PrepConfig
from .operands import Arguments

observers: list[Callable[[Launch], None]] = []  # called for the launches of all threads; `observed` adds them
_dry = 0  # how many dry `observed` blocks are open; above zero nothing is launched


class Launch(NamedTuple):
    """A kernel, its number of programs, its arguments by name and the blocks' config.

    `exact`: products and sums are rounded separately, without FMA. `overlaps`: it may begin before the previous launch
    has ended, and waits for that launch's results.
    """

    kernel: Any
    grid: int
    arguments: Arguments
    config: PrepConfig | GemmConfig
    exact: bool = False
    overlaps: bool = False

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        options: dict[str, Any] = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        if private.is_compiled(self.kernel):
            if private.omits_fences():
                options["num_stages"] = 1  # no cp.async
            if self.config.registers:
                options["maxnreg"] = self.config.registers
            # always set: Triton's default differs between versions, and using it gives a warning
            options["enable_fp_fusion"] = not self.exact
            if self.overlaps:
                options["launch_pdl"] = True
        return options


@contextmanager
def observed(dry: bool = False) -> Iterator[list[Launch]]:
    """Yield the list of launches that the block makes; `dry` runs none of them, so that tensors may be on `meta`."""
    global _dry
    launches: list[Launch] = []
    observers.append(launches.append)
    _dry += dry
    try:
        yield launches
    finally:
        _dry -= dry
        observers.remove(launches.append)


def launch(call: Launch) -> None:
    """Launch a kernel."""
    for observer in observers:
        observer(call)
    if not _dry:
        run(call)


def run(call: Launch) -> None:
    """Run a kernel; a module global, so that tests can execute compiled kernels without a GPU."""
    call.kernel[(call.grid,)](**call.arguments, **call.options)
