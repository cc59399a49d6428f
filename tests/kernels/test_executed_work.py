"""The work counted for compiled launches: against arithmetic on their tilings, and of a few programs against all.

Of every kernel in every shipped configuration, the first and last programs run on memory without bytes: no instruction
is unknown, and every check passes except those of values.
"""

from dataclasses import fields

import environment
import pytest
import torch

from benchmarks.kernels import static_report
from benchmarks.kernels.executed_work import compulsory, launch_work, shares
from benchmarks.kernels.gpus import SECTOR_BYTES
from benchmarks.kernels.launches import plan_for, record
from benchmarks.kernels.ptx.launch import compile_launch
from benchmarks.kernels.ptx.plugin import Executor
from benchmarks.kernels.ptx.work import Work, work_of
from benchmarks.kernels.static_report import DTYPES, config_name, launch_key
from lorasb.kernels.block_sizes import GemmConfig, PrepConfig
from lorasb.kernels.launcher import Launch
from lorasb.kernels.plan import LaunchPlan

pytestmark = pytest.mark.skipif(not environment.PTX, reason="executes compiled kernels: pytest --ptx sm_86")
SHAPES = {"one layer, split": (256, 512, (128,), 64), "two members": (128, 256, (256, 128), 64)}


def recorded(op: str, arch: str, M: int, n: int, ms: tuple[int, ...], r: int) -> list[Launch]:
    chosen = plan_for(op, torch.bfloat16, M, n, ms, r, arch, 84)
    return record(op, LaunchPlan("fused", chosen.prep, chosen.gemm), torch.bfloat16, M, n, ms, r)


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_launch_has_the_products_of_its_shape(shape: str, op: str, executor: Executor) -> None:
    """All programs executed: the 16-bit products match exactly; and a few programs represent all.

    Products with R have two tf32 parts, one of which sm_90 computes twice.
    """
    M, n, ms, r = SHAPES[shape]
    thin, core = 2 * M * r, 2 * M * r * r * len(ms)
    if op == "forward":
        wanted = [thin * n * len(ms), 2 * M * sum(ms) * (n + r)]
    else:
        wanted = [thin * sum(ms), 2 * M * n * (sum(ms) + r * len(ms)) + core]
    for launch, products in zip(recorded(op, executor.arch, *SHAPES[shape]), wanted, strict=True):
        every = work_of(launch, compile_launch(launch, executor.driver), range(launch.grid))
        with_core = core if launch.name.startswith("prep") else 0
        assert every.tensor_flops == products
        assert 2 * with_core <= every.tf32_flops <= 3 * with_core
        assert every.issue_slots > every.shared_wavefronts / 4 > 0
        assert close(launch_work(launch, executor.arch), every, 0.03)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_a_launch_of_one_tile_moves_every_byte_once(op: str, executor: Executor) -> None:
    M = r = 16
    one_tile = LaunchPlan("fused", PrepConfig(M, 64, 4, 2), GemmConfig(M, 64, 64, 1, 4, 2))
    for launch in record(op, one_tile, torch.bfloat16, M, 64, (64,), r):
        moved = work_of(launch, compile_launch(launch, executor.driver), range(launch.grid)).global_sectors
        again = 2 * M * r if launch.name.startswith("prep") else 0  # it reads what it wrote, to multiply by R
        assert SECTOR_BYTES * moved == compulsory(launch) + again


def close(a: Work, b: Work, bound: float) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Work)]
    return all(abs(x - y) <= bound * y for x, y in pairs)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_lines_are_what_executing_all_of_it_gives(op: str, executor: Executor) -> None:
    """A group on a large grid: each share executed in full, and extrapolated from two short lengths."""
    for launch in recorded(op, executor.arch, 2048, 1024, (1024, 512), 32):
        compiled, whole = compile_launch(launch, executor.driver), Work()
        for share in shares(launch):
            whole += work_of(launch, compiled, share.programs) * share.times
        assert close(launch_work(launch, executor.arch), whole, 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_kernel_executes(dtype: str, executor: Executor) -> None:
    jobs = [job for job in static_report.jobs([executor.arch]) if DTYPES[job.dtype] == dtype]
    different = {launch_key(launch): (job, launch) for job in jobs for launch in static_report.launches_of(job)}
    failed = []
    for job, launch in different.values():
        try:
            work = work_of(launch, compile_launch(launch, executor.driver), sorted({0, launch.grid - 1}))
            assert work.issue_slots > 0
        except Exception as error:
            failed.append(f"{launch.name} ({job.variant.label}, {config_name(launch)}): {error}")
    assert not failed, "\n".join(failed)
    assert len(different) >= 20
