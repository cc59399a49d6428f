"""The kernels' main loops in machine code, compared with CUTLASS: what bounds the tensor cores. No GPU needed.

    python -m benchmarks.kernels.main_loops [--arch sm_86] [--json] [--output FILE]

Per kernel and architecture in bf16, as the shipped tables choose it for a layer of 4096 x 4096 at r = 96 and 2048
tokens: instructions, LDSM and barriers per MMA of the main loop, registers, programs per multiprocessor, and the share
of cycles in which the tensor cores are busy, simulated under two scheduler policies with all data available. That is an
upper bound: expect a card to show between half and all of a difference. sm_90's wgmma and sm_100's tcgen05 run
asynchronously; for sm_90, compare the instructions per 64x128x16. Memory, which bounds the thin passes
over x and calls of few rows, is not simulated: see `python -m benchmarks.kernels.roofline`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
import triton
from rich.table import Table

from benchmarks.common.timing import provenance
from benchmarks.kernels import sass, static_report
from benchmarks.kernels.static_report import ARCHS, Job
from benchmarks.kernels.variants import GRADIENTS

# Cycles that m16n8k16 in 16 bits with fp32 sums, or m16n8k8 in TF32, occupies a scheduler's tensor core. sm_86 is the
# RTX A6000; sm_89 and sm_120 are GeForce, which sums in fp32 at half of that rate.
MMA_CYCLES = {"sm_80": 8, "sm_86": 16, "sm_89": 32, "sm_120": 32}
FULL_SHAPES = ("16816", "1688.F32.TF32")
UNIT = 64 * 128 * 16  # multiplications in the unit that compares wgmma instructions


@dataclass(frozen=True)
class MainLoop:
    """The main loop of one kernel."""

    kernel: str
    variant: str
    arch: str
    config: str
    registers: int | None
    programs: int | None  # per multiprocessor
    instructions: int | None
    per_mma: float  # instructions per mma.sync, or per 64x128x16 of wgmma
    ldsm_per_mma: float
    barriers: int  # of all warps of a program, per iteration
    bound: tuple[float, ...]  # `sass.tensor_share` by policy; empty where tensor cores run asynchronously


# CUTLASS 4.7 (BSD license), the tile families that cuBLAS uses: compiled for bf16 with fp32 sums and read by this tool.
CUTLASS = "CUTLASS 4.7"
PEER = (
    MainLoop(CUTLASS, "gemm", "sm_86", "128x128x32 w4 p4", None, None, None, 2.53, 0.25, 1, (1.0, 1.0)),
    MainLoop(CUTLASS, "gemm", "sm_86", "128x128x64 w4 p3", None, None, None, 2.32, 0.25, 1, (1.0, 1.0)),
    MainLoop(CUTLASS, "gemm", "sm_80", "128x128x32 w4 p4", None, None, None, 2.53, 0.25, 1, (0.825, 0.796)),
    MainLoop(CUTLASS, "gemm", "sm_80", "128x128x64 w4 p3", None, None, None, 2.32, 0.25, 1, (0.865, 0.865)),
    MainLoop(CUTLASS, "gemm", "sm_90", "128x256x64 TMA", None, None, 48, 6.0, 0.0, 0, ()),
)


def measure(archs: list[str], workers: int | None = None) -> list[MainLoop]:
    """Compile and simulate the kernels that multiply by MMA, equal ones once."""
    jobs = list(static_report.jobs(archs, brief=True))
    jobs += [static_report.gradient_job(GRADIENTS[0], torch.bfloat16, arch) for arch in archs]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        found = list(pool.map(_main_loop, static_report.kernels_of(jobs), chunksize=2))
    return [one for one in found if one is not None]


def _main_loop(item: tuple[Job, int]) -> MainLoop | None:
    job, place = item
    launch = static_report.launches_of(job)[place]
    arch, warps = ARCHS[job.arch], launch.options["num_warps"]
    registers, _, shared, dump = static_report.compile_launch(launch, int(job.arch[3:]))
    loop = sass.main_loop(sass.instructions(dump))
    if not loop:
        return None
    programs = static_report.ctas_per_sm(arch, registers, shared, warps)
    kinds = Counter(one.kind for one in loop)
    units = _wgmma_units(loop) or kinds["MMA"]
    return MainLoop(
        kernel=static_report.kernel_name(launch),
        variant=job.variant.label,
        arch=job.arch,
        config=static_report.config_name(launch),
        registers=registers,
        programs=programs,
        instructions=len(loop),
        per_mma=round(len(loop) / units, 2),
        ldsm_per_mma=round(kinds["LDSM"] / units, 3),
        barriers=sum(one.is_program_barrier for one in loop),
        bound=bounds(loop, job.arch, warps, programs),
    )


def _wgmma_units(loop: sass.Code) -> float:
    """The loop's wgmma instructions in units of 64x128x16; 0 without one."""
    shapes = [re.search(r"^HGMMA\.(\d+)x(\d+)x(\d+)", one.opcode) for one in loop]
    return sum(int(shape[1]) * int(shape[2]) * int(shape[3]) / UNIT for shape in shapes if shape)


def bounds(loop: sass.Code, arch: str, warps: int, programs: int) -> tuple[float, ...]:
    """`sass.tensor_share` under both policies; empty where the architecture's MMA is asynchronous."""
    mma = next(one.opcode for one in loop if one.kind == "MMA")
    if arch not in MMA_CYCLES or not mma.startswith("HMMA"):
        return ()
    cycles = MMA_CYCLES[arch] if any(shape in mma for shape in FULL_SHAPES) else MMA_CYCLES[arch] // 2
    return tuple(round(sass.tensor_share(loop, warps, programs, cycles, policy), 3) for policy in sass.POLICIES)


def table(found: list[MainLoop]) -> Table:
    """The rows, and CUTLASS for the same architectures."""
    view = Table(title=f"Main loops in bf16, triton {triton.__version__}")
    heads = ("kernel", "variant", "arch", "config", "registers", "programs", "instructions", "per MMA", "LDSM per MMA")
    for name in (*heads, "barriers", *(f"bound, {policy}" for policy in sass.POLICIES)):
        view.add_column(name, justify="left" if name in ("kernel", "variant", "config") else "right")
    peers = [one for one in PEER if one.arch in {row.arch for row in found}]
    for row in [*found, *peers]:
        *values, bound = asdict(row).values()
        shown = [f"{share:.3f}" for share in bound] or ["", ""]
        texts = ("" if value is None else str(value) for value in values)
        view.add_row(*texts, *shown, style="dim" if row.kernel == CUTLASS else None)
    return view


def main() -> None:
    """Measure and print."""
    options = static_report.command_line(__doc__).parse_args()
    warnings.simplefilter("ignore")
    found = measure(options.arch or list(ARCHS))
    rows = {"triton": triton.__version__, "rows": [asdict(row) for row in found], "peer": [asdict(row) for row in PEER]}
    static_report.show(rows | provenance(), table(found), options)


if __name__ == "__main__":
    main()
