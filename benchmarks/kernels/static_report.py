"""Compiler output of every kernel: registers, spills, shared memory, occupancy, instructions. No GPU needed.

    python -m benchmarks.kernels.static_report [--json] [--arch sm_86] [--output FILE]

Every kernel is compiled ahead of time in bf16, fp16 and fp32, with every configuration of the shipped tables, for
sm_80, sm_86, sm_89, sm_90, sm_100 and sm_120, exactly as it is launched: calls are recorded on tensors without memory.
`loop` is the number of instructions in the longest loop, `masked step` in a step over x with dropout; `a weight`, for a
4-bit GEMM, is the number of loop instructions that a thread executes per weight that it decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.kernels import sass
from benchmarks.kernels.launches import plan_for, record, record_gradient, record_quantized, record_rows
from benchmarks.kernels.variants import BATCH, BF16_VARIANTS, DROPOUT, GRADIENTS, QUANTIZED, ROWS, VARIANTS, Variant
from lorasb.backends.autotune import TMA_GEMMS
from lorasb.kernels.block_sizes import cdiv
from lorasb.kernels.launcher import Launch
from lorasb.kernels.plan import DTYPES, LaunchPlan

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Arch:
    """Limits of a multiprocessor: registers, bytes of shared memory (per program; in total), warps, programs."""

    sms: int
    shared_limit: int
    shared: int
    warps: int
    programs: int
    registers: int = 65536


ARCHS = {
    "sm_80": Arch(108, 163 * 1024, 164 * 1024, 64, 32),
    "sm_86": Arch(84, 99 * 1024, 100 * 1024, 48, 16),
    "sm_89": Arch(128, 99 * 1024, 100 * 1024, 48, 24),
    "sm_90": Arch(132, 227 * 1024, 228 * 1024, 64, 32),
    "sm_100": Arch(148, 227 * 1024, 228 * 1024, 64, 32),
    "sm_120": Arch(170, 99 * 1024, 100 * 1024, 48, 24),
}

MAIN = "sm_86"  # the architecture of the benchmark suite, for which `--brief` adds groups of layers


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    variant: str
    dtype: str
    arch: str
    config: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    mma: int
    tcgen05: int
    mma_share: float
    loop: int
    a_weight: float | None
    masked_step: int | None


@dataclass(frozen=True)
class Job:
    """What to compile: names and plain values, so that another process can do it."""

    launch_of: str
    variant: Variant
    dtype: torch.dtype
    arch: str
    plan: LaunchPlan


def jobs(archs: list[str], brief: bool = False) -> Iterator[Job]:
    """Yield every kernel, dtype and configuration that the tables choose for the variants.

    With `brief`, one representative per kernel and architecture, in bf16: what the tables choose for a layer of 4096 x
    4096 at r = 96 and 2048 tokens, for a sum of gradients with ragged edges, and for 4-bit weights decoded inline or
    into a scratch tensor. sm_86, whose shared memory is the smallest, adds groups of layers and dropout.
    """
    for arch in archs:
        for dtype in DTYPES:
            if brief and dtype != torch.bfloat16:
                continue
            bf16, main = dtype == torch.bfloat16, arch == MAIN and dtype == torch.bfloat16
            some = (*VARIANTS[:3], DROPOUT) if main else VARIANTS[:1]
            for variant in some if brief else BF16_VARIANTS if bf16 else VARIANTS:
                for op in ("forward", "backward"):
                    plan = _plan(op, variant, dtype, arch)
                    yield Job(op, variant, dtype, arch, replace(plan, path="fused"))
                    if arch == "sm_90" and dtype != torch.float32:
                        yield Job(op, variant, dtype, arch, replace(plan, path="tma", gemm=TMA_GEMMS[0]))
                    if variant.dropout:  # the masked term is a separate kernel
                        yield Job(op, variant, dtype, arch, replace(plan, path="addmm"))
            for variant in GRADIENTS if bf16 and not brief else GRADIENTS[-1:]:
                yield gradient_job(variant, dtype, arch)
            for variant in ROWS if bf16 and not brief else ROWS[:1]:
                yield Job("rows", variant, dtype, arch, _plan("forward", variant, dtype, arch))
            for variant in QUANTIZED if bf16 and not brief else (QUANTIZED[0], QUANTIZED[-1]):
                yield Job("quantized", variant, dtype, arch, _plan("forward", variant, dtype, arch, "4bit"))


def gradient_job(variant: Variant, dtype: torch.dtype, arch: str) -> Job:
    """The job of a sum of gradients, which ignores the plan."""
    return Job("gradient", variant, dtype, arch, _plan("forward", variant, dtype, arch))


def _plan(op: str, variant: Variant, dtype: torch.dtype, arch: str, quant: str = "none") -> LaunchPlan:
    return plan_for(op, dtype, variant.M, variant.n, variant.ms, variant.r, arch, ARCHS[arch].sms, quant)


def rows(archs: list[str], workers: int | None = None, brief: bool = False) -> list[Row]:
    """Compile all kernels, or with `brief` one representative per kernel and architecture; equal ones once."""
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(_row, kernels_of(jobs(archs, brief)), chunksize=4))


def kernels_of(wanted: Iterable[Job]) -> list[tuple[Job, int]]:
    """The distinct kernels of jobs, each as a job and the index of one of its launches."""
    unique: dict[str, tuple[Job, int]] = {}
    for job in wanted:
        for place, launch in enumerate(launches_of(job)):
            unique.setdefault(f"{job.arch} {launch_key(launch)}", (job, place))
    return list(unique.values())


def launches_of(job: Job) -> list[Launch]:
    """Record a job's launches on tensors without memory."""
    v = job.variant
    if job.launch_of == "gradient":
        return record_gradient(job.dtype, v.M, v.n, v.ms[0], job.arch)
    if job.launch_of == "rows":
        return record_rows(job.plan, job.dtype, v.n, v.ms[0], v.r, BATCH, v.M // BATCH)
    if job.launch_of == "quantized":
        return record_quantized(job.plan, job.dtype, v.M, v.n, v.ms[0], v.r, v.bias)
    return record(job.launch_of, job.plan, job.dtype, v.M, v.n, v.ms, v.r, v.bias, v.dropout)


def _row(item: tuple[Job, int]) -> Row:
    job, place = item
    launch = launches_of(job)[place]
    arch = ARCHS[job.arch]
    registers, stack, shared, dump = compile_launch(launch, int(job.arch[3:]))
    code = sass.instructions(dump)
    mma, share, loop = mma_loop(code)
    programs = ctas_per_sm(arch, registers, shared, launch.options["num_warps"])
    return Row(
        kernel=kernel_name(launch),
        variant=job.variant.label,
        dtype=DTYPES[job.dtype],
        arch=job.arch,
        config=config_name(launch),
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        ctas_per_sm=programs,
        mma=mma,
        tcgen05=sum(one.opcode.startswith("UTC") for one in code),
        mma_share=share,
        loop=loop,
        a_weight=_instructions_per_weight(launch, loop),
        masked_step=_masked_step(code) if launch.name == "prep_forward" and launch.arguments["DROPOUT"] else None,
    )


def _instructions_per_weight(launch: Launch, loop: int) -> float | None:
    """Instructions per weight of a step that decodes BLOCK_N x BLOCK_K weights in 4 bits."""
    if launch.name != "quantized_gemm":
        return None
    threads = 32 * launch.options["num_warps"]
    return round(loop * threads / (launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_K"]), 1)


def _masked_step(code: sass.Code) -> int:
    """Instructions of the loop that draws a mask: Philox gives it by far the most WIDE.U32 products."""
    loops = [code[slice(*loop)] for loop in sass.loops_of(code)]
    return max((sum("WIDE.U32" in one.text for one in loop), len(loop)) for loop in loops)[1]


def kernel_name(launch: Launch) -> str:
    """The kernel's name, its direction if the kernel has both, and what else the launch does."""
    is_backward = launch.arguments.get("BACKWARD") or not launch.arguments.get("K_MAJOR", True)
    with_weight = launch.arguments.get("prep_programs") is not None
    return launch.name + (" and dequantize" if with_weight else " backward" if is_backward else "")


def config_name(launch: Launch) -> str:
    """Blocks, splits, warps, stages, as one word."""
    a, o = launch.arguments, launch.options
    blocks = "x".join(str(a[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in a)
    if launch.name == "grad_sign":
        kind = ("keep " if a["KEEP"] else "") + ("signs" if a["SIGNS"] else "")
        return f"{blocks} w{o['num_warps']} p{o['num_stages']} {kind.strip()}"
    if launch.name == "tma_gemm":
        blocks = "x".join(map(str, (*a["ys"][0].block_shape, a["lefts"][0][0].block_shape[1])))
        return f"{blocks} w{o['num_warps']} p{o['num_stages']}"
    if launch.name == "dequantize":
        return f"{a['BLOCK_BYTES']} w{o['num_warps']}"
    if "splits" not in a:
        return f"{a['BLOCK_M']} w{o['num_warps']} p{o['num_stages']}"
    cap = f" cap {o['maxnreg']}" if "maxnreg" in o else ""
    return f"{blocks} s{a['splits']} w{o['num_warps']} p{o['num_stages']}{cap}"


def compile_launch(launch: Launch, capability: int) -> tuple[int, int, int, str]:
    """Registers, stack bytes, shared bytes and SASS of a recorded launch."""
    signature, constants, attributes = specialization(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = _cuobjdump(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {launch.name}: {dump[:200]!r}")
    return int(found[1]), int(found[2]), compiled.metadata.shared, dump


def _cuobjdump(path: str) -> str:
    """Resource usage and SASS from one process, because starting it costs as much as its output."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout


def specialization(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and divisibilities of a launch, as Triton's own launcher would specialize it."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind_of(place: tuple[int, ...], value: Any, plain: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(kind_of((*place, i), member, plain) for i, member in enumerate(value))
        kind = _kind(value, plain)
        if kind == "constexpr":
            constants[place] = value
        elif _divisible(value, plain):
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)] = value
            signature[parameter.name] = tuple("constexpr" for _ in value) if isinstance(value, tuple) else "constexpr"
        else:
            signature[parameter.name] = kind_of((index,), value, parameter.do_not_specialize)
    return signature, constants, attributes


def _kind(item: Any, plain: bool) -> str:
    if item is None:
        return "constexpr"
    if isinstance(item, TensorDescriptor):
        return f"tensordesc<{POINTERS[item.base.dtype][1:]}{item.block_shape}>"
    if isinstance(item, torch.Tensor):
        return POINTERS[item.dtype]
    if isinstance(item, float):
        return "fp32"
    return "constexpr" if item == 1 and not plain else "i32" if -(2**31) <= item < 2**31 else "i64"


def _divisible(item: Any, plain: bool) -> bool:
    return isinstance(item, torch.Tensor) or (isinstance(item, int) and not plain and item % 16 == 0)


def launch_key(launch: Launch) -> str:
    """Return what Triton specializes a launch on: launches with equal keys share a kernel."""
    signature, constants, attributes = specialization(launch)
    return f"{launch.name} {signature} {constants} {attributes} {launch.options}"


def ctas_per_sm(arch: Arch, registers: int, shared: int, warps: int) -> int:
    """Programs that fit on a multiprocessor: registers come by 256 per warp, programs take 1 KiB more shared memory."""
    by_registers = arch.registers // (cdiv(registers * 32, 256) * 256 * warps)
    return min(by_registers, arch.shared // (shared + 1024), arch.warps // warps, arch.programs)


def mma_loop(code: sass.Code) -> tuple[int, float, int]:
    """Number of MMA instructions, their share of the main loop, and the length of the longest loop."""
    loop, longest = sass.main_loop(code), max((end - start for start, end in sass.loops_of(code)), default=0)
    share = sum(one.kind == "MMA" for one in loop) / len(loop) if loop else 0.0
    return sum(one.kind == "MMA" for one in code), round(share, 3), longest


def table(found: list[Row]) -> Table:
    """Format the rows as a table."""
    view = Table(title=f"kernels compiled ahead of time, triton {triton.__version__}")
    for name in Row.__dataclass_fields__:
        view.add_column(name.replace("_", " "), justify="left" if name in ("kernel", "variant", "config") else "right")
    for row in found:
        values = ("" if value is None else str(value) for value in asdict(row).values())
        view.add_row(*values, style="red" if row.stack_bytes else None)
    return view


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options of a report on compiled kernels."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="all six unless given")
    parser.add_argument("--output", type=Path, help="write the JSON to a file too")
    return parser


def show(found: Any, view: Table, options: argparse.Namespace) -> None:
    """Print a report in the format of the options, and write its file."""
    text = json.dumps(found, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        Console(width=180).print(view)


def main() -> None:
    """Compile and print."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--brief", action="store_true", help="one representative configuration per kernel and architecture"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = rows(options.arch or list(ARCHS), brief=options.brief)
    show([asdict(row) for row in found], table(found), options)


if __name__ == "__main__":
    main()
