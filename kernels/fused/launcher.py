"""How kernels are launched, and how launches are watched: tests and reports read what is really launched from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from .block_sizes import GemmConfig, PrepConfig

_observers: list[Callable[[Launch], None]] = []
_dry = 0  # how many dry `observed` blocks are open; above zero nothing is launched


class KernelCall(NamedTuple):
    """A kernel, its number of programs and its arguments by name: what `launch` takes, without the blocks' config."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """What was launched: a kernel, its grid, its arguments by name and the compiler's options."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


@contextmanager
def observed(dry: bool = False) -> Iterator[list[Launch]]:
    """The list of launches that the block makes; `dry` runs none of them, so that tensors may lie on `meta`."""
    global _dry
    launches: list[Launch] = []
    _observers.append(launches.append)
    _dry += dry
    try:
        yield launches
    finally:
        _dry -= dry
        _observers.remove(launches.append)


def launch(
    kernel: Any, grid: int, arguments: dict[str, Any], config: PrepConfig | GemmConfig, exact: bool = False
) -> None:
    """Launch a kernel over `grid` programs; `exact` keeps products and sums apart, each rounded: no FMA."""
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = hasattr(kernel, "device_caches")  # the interpreter takes no compiler options
    if compiled and isinstance(config, GemmConfig) and config.registers:
        options["maxnreg"] = config.registers
    if compiled:  # said either way: Triton's own default differs between versions, and it warns where it is taken
        options["enable_fp_fusion"] = not exact
    for observer in _observers:
        observer(Launch(kernel, grid, arguments, options))
    if not _dry:
        run(kernel, grid, arguments, options)


def run(kernel: Any, grid: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Run a kernel; a module global, so that tests can execute compiled kernels elsewhere than on a card."""
    kernel[(grid,)](**arguments, **options)
