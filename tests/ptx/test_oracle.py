"""Besides the interpreter, an oracle: `sentryward` finds a kernel free of races in every schedule of a fixed launch. It
supports no branches on data (split sums), no wgmma and no codebooks; it counts two stores of one value as a race.
"""

import json
import re
from itertools import product
from pathlib import Path

import environment
import pytest
import torch

from benchmarks.kernels.launches import record
from benchmarks.kernels.ptx.launch import Compiled, compile_launch, flattened, parsed
from benchmarks.kernels.ptx.plugin import Executor
from lorasb.kernels.block_sizes import GemmConfig, PrepConfig
from lorasb.kernels.launcher import Launch
from lorasb.kernels.plan import LaunchPlan

pytest.importorskip("sentryward", reason="needs sentryward, which finds races: pip install sentryward")
ARCHS = ("sm_86", "sm_90", "sm_100")
pytestmark = [
    pytest.mark.skipif(environment.PTX not in ARCHS, reason="reads compiled kernels: pytest --ptx sm_86 -m long"),
    pytest.mark.long,
]
BAR = re.compile(r"\n\s*bar\.sync\s+0;")


def extended_gemm(op: str, stages: int, executor: Executor) -> tuple[Launch, Compiled]:
    plan = LaunchPlan("fused", PrepConfig(16, 32, 4, stages), GemmConfig(16, 32, 32, 1, 4, stages))
    *_, launch = record(op, plan, torch.bfloat16, 16, 128, (64,), 16)
    return launch, compile_launch(launch, executor.driver)


def verdict(launch: Launch, compiled: Compiled, ptx: str, folder: Path) -> str:
    """The oracle's verdict on a kernel at its launch."""
    from sentryward import verify

    parameters = parsed(compiled.ptx).parameters.values()
    pairs = zip(parameters, flattened(launch, compiled.signature), strict=False)  # Triton adds two more
    arguments = [
        {"parameter": i, "type": parameter.kind, "value": value}
        for i, (parameter, value) in enumerate(pairs)
        if not isinstance(value, torch.Tensor)
    ]
    dimensions = {"grid_dim": [launch.grid, 1, 1], "block_dim": [128, 1, 1], "cluster_dim": [1, 1, 1]}
    given = {"launch": dimensions | {"dynamic_shared_bytes": compiled.shared}, "arguments": arguments}
    (folder / "kernel.ptx").write_text(ptx)
    (folder / "input.json").write_text(json.dumps({"schema": "spverify.kernel-input/v1"} | given))
    return str(verify(folder / "kernel.ptx", input=folder / "input.json", timeout_seconds=120)["result"])


@pytest.mark.parametrize(("op", "stages"), product(("forward", "backward"), (1, 3)))
def test_no_schedule_of_the_extended_gemm_has_a_race(op: str, stages: int, executor: Executor, tmp_path: Path) -> None:
    launch, compiled = extended_gemm(op, stages, executor)
    assert verdict(launch, compiled, compiled.ptx, tmp_path) == "race_free"


def test_it_finds_the_race_that_a_barrier_prevents(executor: Executor, tmp_path: Path) -> None:
    launch, compiled = extended_gemm("forward", 1, executor)
    assert BAR.search(compiled.ptx)
    assert verdict(launch, compiled, BAR.sub("\n", compiled.ptx), tmp_path) == "potential_race"
