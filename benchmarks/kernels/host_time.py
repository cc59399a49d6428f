"""Host time of launches: Python's time for a layer's and a group's forward and backward. No GPU needed.

    python -m benchmarks.kernels.host_time [--arch sm_86] [--calls 200] [--json] [--tritons .venv/tritons]

CUDA is stubbed out: kernels are compiled and specialized, and the driver's launch does nothing; tensors are on the CPU.
The baseline is the chain of plain torch ops that the kernels replace, on tensors so small that arithmetic is nothing.
Two more ways show what the shortcuts save: ordinary launches, in place of prepared ones, and keys and allocation in
Python, in place of the C++ extension's. `--arch sm_90` adds the TMA path.
Times are microseconds of one thread's CPU time: medians over rounds in turns, and ratios within a round.
`--tritons` measures every version of Triton in a folder (`make bench-kernels` installs the tested ones), each in a
separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime import driver

from benchmarks.common.timing import cpu_allocations, provenance, stats_of
from benchmarks.kernels.ptx.launch import FakeDriver
from benchmarks.kernels.static_report import ARCHS

# small: CUDA's allocator takes the same time for any size, but malloc returns large blocks to the system
M, FEATURES, RANK, ROUNDS, SCALE = 32, 128, 32, 9, 0.7
Call = Callable[[], Any]
Way = tuple[Call, Callable[[], AbstractContextManager[Any]]]  # a call, and the context in which it is timed
LAYER, GROUP = "ours, a layer", "ours, a group of 3"
Rows = dict[str, dict[str, float]]


class StubDriver(FakeDriver):
    """The parts of Triton's driver that a launch uses; launching does nothing."""

    def __init__(self, arch: str) -> None:
        super().__init__(int(arch[3:]))
        limits = {
            "max_shared_mem": ARCHS[arch].shared_limit,
            "multiprocessor_count": ARCHS[arch].sms,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 100, 0, 1024), get_device_properties=lambda _: limits, unload_module=id
        )
        self.launcher_cls = lambda *_: lambda *_: None


def adapted_calls() -> dict[str, Call]:
    """Forward and backward through the kernels: one layer, and a group of three."""
    from lorasb.functional import lora_sb_linear, lora_sb_linear_group

    def tensors(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape).bfloat16() for _ in range(3)]

    (x, *_), W, dy = tensors(M, FEATURES), tensors(FEATURES, FEATURES), tensors(M, FEATURES)
    A, B = tensors(RANK, FEATURES), tensors(FEATURES, RANK)
    R = [torch.randn(RANK, RANK).requires_grad_() for _ in range(3)]
    x.requires_grad_()

    def layer() -> None:
        torch.autograd.grad(lora_sb_linear(x, W[0], A[0], R[0], B[0], None, SCALE), (x, R[0]), dy[0])

    def group() -> None:
        ys = lora_sb_linear_group(x, W, A, R, B, scalings=[SCALE] * 3)
        torch.autograd.grad(ys, (x, *R), dy)

    return {LAYER: layer, GROUP: group}


def chain_calls() -> dict[str, Call]:
    """Forward and backward by plain torch ops over tiny tensors: one layer, and three that read the same x."""
    x, dy = (torch.randn(1, 8).bfloat16() for _ in range(2))
    W, A, B = (torch.randn(*shape).bfloat16() for shape in ((8, 8), (4, 8), (8, 4)))
    R = [torch.randn(4, 4).requires_grad_() for _ in range(3)]
    x.requires_grad_()

    def one(core: Tensor) -> Tensor:
        return linear(x, W) + SCALE * linear(linear(linear(x, A), core.to(x.dtype)), B)

    def layer() -> None:
        torch.autograd.grad(one(R[0]), (x, R[0]), dy)

    def group() -> None:
        torch.autograd.grad([one(core) for core in R], (x, *R), [dy] * 3)

    return {"plain ops, a layer": layer, "plain ops, 3 layers": group}


def _ordinary() -> AbstractContextManager[Any]:
    """Launch by Triton's own code, without prepared launches."""
    from lorasb.kernels import prepared_linear

    return mock.patch.object(prepared_linear, "_is_ready", return_value=False)


@contextmanager
def _keys_in_python() -> Iterator[None]:
    """Compute launch keys and allocate tensors without the extension."""
    from lorasb.kernels import prepared_launch
    from lorasb.ops import calls

    with (
        mock.patch.object(calls, "signature_of", calls.signature_in_python),
        mock.patch.object(calls, "metadata", calls.metadata_in_python),
        mock.patch.object(prepared_launch, "allocate", prepared_launch.allocate_in_python),
        mock.patch.object(prepared_launch, "addresses", prepared_launch.addresses_in_python),
    ):
        yield


@contextmanager
def by_tma() -> Iterator[None]:
    """Plan the TMA path; kinds of calls are prepared again at either end."""
    from lorasb.backends.autotune import TMA_GEMMS
    from lorasb.kernels import plan

    by_table = plan.choice

    def choice(shape: plan.Shape, arch: str, sms: int) -> plan.LaunchPlan:
        return replace(by_table(shape, arch, sms), path="tma", gemm=TMA_GEMMS[0])

    plan.forget()
    with mock.patch.object(plan, "choice", choice):
        yield
    plan.forget()


def ways(arch: str) -> dict[str, Way]:
    """All calls that are compared."""
    from lorasb.compat.triton import has_tma

    ours = adapted_calls()
    found: dict[str, Way] = {name: (call, nullcontext) for name, call in ours.items()}
    for name, call in ours.items():
        found[f"{name}, ordinary launches"] = call, _ordinary
        found[f"{name}, keys in Python"] = call, _keys_in_python
        if arch == "sm_90" and has_tma():
            found[f"{name}, TMA"] = call, by_tma
    return found | {name: (call, nullcontext) for name, call in chain_calls().items()}


def microseconds(calls: dict[str, Way], count: int) -> dict[str, list[float]]:
    """CPU time of each call in every round, a mean over `count` calls; ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS + 1):
        for name, (call, context) in calls.items():
            with context():
                call(), call()  # compiles, fills caches
                start = time.process_time()
                for _ in range(count):
                    call()
                if i > 0:
                    found[name].append((time.process_time() - start) / count * 1e6)
    return found


def measure(arch: str, count: int) -> Rows:
    """Measure every way: µs, its ratio to the same work by plain ops, and how many tensors it allocates."""
    import lorasb
    from lorasb.backends import triton as backend

    driver.set_active(StubDriver(arch))
    torch.set_num_threads(1)

    def device(_: torch.device) -> tuple[str, int]:  # a Mock would take longer than what is measured
        return arch, ARCHS[arch].sms

    def allowed() -> bool:
        return True

    timed = ways(arch)
    with (
        mock.patch.object(backend, "architecture", device),
        mock.patch.object(backend, "interpreting", allowed),
        lorasb.backend("triton"),
    ):
        times = microseconds(timed, count)
        allocations = {}
        for name, (call, context) in timed.items():
            with context():
                call(), call()  # prepares again what another way forgot
                allocations[name] = sum(size > 0 for size in cpu_allocations(call))
    found = {}
    for name, us in times.items():
        stats = stats_of(us, times["plain ops, 3 layers" if "3" in name else "plain ops, a layer"])
        found[name] = {
            "us": stats.p50,
            "ratio": stats.ratio,
            "ratio_p20": stats.ratio_p20,
            "ratio_p80": stats.ratio_p80,
            "allocations": allocations[name],
        }
    return found


def by_version(folder: Path, arch: str, count: int) -> dict[str, Rows]:
    """The rows of each version of Triton in a folder, oldest first."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        command = ("-m", "benchmarks.kernels.host_time", "--json", "--arch", arch, "--calls", str(count))
        paths = os.pathsep.join(filter(None, (str(path.resolve()), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        found[path.name] = json.loads(done.stdout)["rows"]
    return found


def view(title: str, found: Rows) -> Table:
    """The results as a table."""
    table = Table(title=f"Host time of forward and backward, {title}, CUDA stubbed out: CPU time of one thread")
    for column in ("", "µs", "over plain ops (20th-80th percentile)", "tensors allocated"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in found.items():
        ratio = f"{row['ratio']:.2f} ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})"
        table.add_row(name, f"{row['us']:.0f}", ratio, f"{row['allocations']:.0f}")
    return table


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(ARCHS), default="sm_86")
    parser.add_argument("--calls", type=int, default=200, help="per round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tritons", type=Path, help="a folder with one folder per version of Triton")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    versions = by_version(options.tritons, options.arch, options.calls) if options.tritons else {}
    found = measure(options.arch, options.calls)
    if options.json:
        from lorasb.backends import cpp

        extension = cpp.missing() is None  # it has the functions that every call uses
        kept = {"arch": options.arch, "extension": extension, "rows": found, "tritons": versions}
        print(json.dumps(kept | provenance(), indent=1))
        return
    console = Console(width=120)
    for version, rows in versions.items():
        console.print(view(f"{options.arch}, Triton {version}", rows))
    console.print(view(options.arch, found))


if __name__ == "__main__":
    main()
