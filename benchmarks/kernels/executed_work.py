"""The work of a launch, counted by executing its compiled code for a few programs (benchmarks/kernels/ptx).

Programs that share a tile, or a row block, are neighbors in the grid and together do all of its work, including the
addition of their sums; the first tile represents all others, also those at an edge. A long reduction is executed at
two short lengths and extrapolated linearly, because each of its steps executes the same instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.kernels.ptx.launch import FakeDriver, compile_launch
from benchmarks.kernels.ptx.work import Work, work_of
from benchmarks.kernels.static_report import launch_key
from lorasb.kernels.block_sizes import cdiv
from lorasb.kernels.launcher import Launch

SHORT = 6, 8  # steps of a program's reduction: more than any software pipeline has stages

_known: dict[str, Work] = {}


@dataclass(frozen=True)
class Share:
    """Neighboring programs that represent `times` such groups: one per tile, row block or tile of dR."""

    programs: range
    times: float


def launch_work(launch: Launch, arch: str) -> Work:
    """The work of the full grid of a `prep_forward`, `prep_backward` or `extended_gemm` on `arch`, e.g. "sm_86"."""
    key = f"{arch} {launch.grid} {launch_key(launch)} {_numbers(launch)}"
    if key not in _known:
        _known[key] = sum((_counted(launch, share, arch) for share in shares(launch)), Work())
    return _known[key]


def shares(launch: Launch) -> Iterator[Share]:
    """Yield the programs of a grid that are executed in place of all."""
    a = launch.arguments
    if launch.name == "prep_forward":
        yield Share(range(a["splits"]), launch.grid / a["splits"])
    elif launch.name == "prep_backward":
        row = a["splits"] * len(a["factors"])  # a row block's members, whose reductions differ in length
        yield Share(range(row), launch.grid / row)
    elif launch.name == "extended_gemm":
        core = a["core_programs"]
        if core:
            yield Share(range(a["core_chunks"]), core / a["core_chunks"])
        if launch.grid > core:
            yield Share(range(core, core + a["splits"]), (launch.grid - core) / a["splits"])
    else:
        raise ValueError(f"expected prep_forward, prep_backward or extended_gemm, got {launch.name}")


def compulsory(launch: Launch) -> int:
    """Bytes of a launch's operands and results, each counted once: the least that DRAM must move."""
    a, forward = launch.arguments, launch.name == "prep_forward"
    rows = a["M"] * len(a["factors"])  # of thin matrices [M, R], one for each member
    if launch.name != "extended_gemm":
        inputs = [a["x"]] if forward else a["dys"]
        columns = a["R"] + (a["R_PADDED"] if forward or a["NEED_DX"] else 0)
        return _bytes(*inputs, *a["factors"], *a["cores"]) + rows * columns * a["v" if forward else "w"].element_size()
    found = 0
    if launch.grid > a["core_programs"]:
        base = [*a["xs"], *a["weights"]] if sum(a["Ks"]) else []
        biases = a["biases"] if a["HAS_BIAS"] else []
        found += _bytes(*base, *a["factors"], *biases, *a["ys"]) + rows * a["R"] * a["v"].element_size()
    if a["core_programs"]:
        found += _bytes(*a["dcores"]) + 2 * a["M"] * a["R"] * len(a["dcores"]) * a["t"].element_size()
    return found


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _counted(launch: Launch, share: Share, arch: str) -> Work:
    """Count the work by executing the launch; a long one is executed at two shorter lengths of its reduction."""
    compiled, steps = compile_launch(launch, _driver(arch)), _steps(launch)
    is_core = share.programs.start < launch.arguments.get("core_programs", 0)
    if is_core or steps <= sum(SHORT):
        return work_of(launch, compiled, share.programs) * share.times
    short, longer = (work_of(_shortened(launch, n), compiled, share.programs) for n in SHORT)
    per_step = (longer + short * -1.0) * (1.0 / (SHORT[1] - SHORT[0]))
    return (longer + per_step * (steps - SHORT[1])) * share.times


def _lengths(launch: Launch) -> tuple[int, ...]:
    a = launch.arguments
    return (a["K"],) if launch.name == "prep_forward" else tuple(a["Ks"])


def _steps(launch: Launch) -> float:
    """Average steps per program among the programs that share the base's reduction."""
    a = launch.arguments
    steps = sum(cdiv(length, a["BLOCK_K"]) for length in _lengths(launch))
    if launch.name == "prep_backward":  # each member's programs take only its steps
        steps /= len(a["factors"])
    return steps / a["splits"]


def _shortened(launch: Launch, steps: int) -> Launch:
    """The launch with `steps` steps of the base's reduction per program, its strides unchanged."""
    a, members = launch.arguments, len(_lengths(launch))
    total = steps * a["splits"]
    if launch.name == "extended_gemm":  # one chain, divided equally among the members
        short = tuple(a["BLOCK_K"] * (total // members + (i < total % members)) for i in range(members))
    else:
        short = (a["BLOCK_K"] * total,) * members
    changed = {"K": short[0]} if launch.name == "prep_forward" else {"Ks": short}
    return launch._replace(arguments=a | changed)


def _numbers(launch: Launch) -> str:
    """The sizes, strides and counts of a launch; without seeds, which do not affect the work."""
    return str({k: v for k, v in launch.arguments.items() if not _has_tensors(v) and k != "seeds"})


def _has_tensors(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, tuple) and value else value, torch.Tensor)


@cache
def _driver(arch: str) -> FakeDriver:
    return FakeDriver(int(arch[3:]))
