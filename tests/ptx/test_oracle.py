"""An oracle beside the interpreter: `sentryward` finds a kernel free of races in every schedule of a fixed launch. It
knows no branches on data (split sums), no wgmma and no codebooks; two stores of one value are a race to it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from processes import python

pytest.importorskip("sentryward", reason="pip install sentryward finds races of kernels")
pytestmark = pytest.mark.long
BAR = re.compile(r"\n\s*bar\.sync\s+0;")

# in a process of its own: kernels are compiled only where Triton does not interpret them
COMPILE = """
import sys, json, torch
from pathlib import Path
from benchmarks.kernels.executed_work import FakeDriver, compile_launch
from benchmarks.kernels.launches import record
from lorasb.kernels.block_sizes import GemmConfig, PrepConfig
from lorasb.kernels.plan import LaunchPlan
from ptx.launch import flattened
folder, driver = Path(sys.argv[1]), FakeDriver(int(sys.argv[2]))
for stages in (1, 3):
    plan = LaunchPlan("fused", PrepConfig(16, 32, 4, stages), GemmConfig(16, 32, 32, 1, 4, stages))
    for op in ("forward", "backward"):
        *_, launch = record(op, plan, torch.bfloat16, 16, 128, (64,), 16)
        compiled = compile_launch(launch, driver)
        arguments = flattened(launch, compiled.signature)
        values = [None if isinstance(one, torch.Tensor) else one for one in arguments]
        (folder / f"{op}-{stages}.ptx").write_text(compiled.ptx)
        facts = {"grid": launch.grid, "shared": compiled.shared, "values": values}
        (folder / f"{op}-{stages}.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module", params=[86, 90, 100])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    python("-c", COMPILE, folder, request.param, TRITON_INTERPRET="0")
    return folder


def verdict(folder: Path, name: str, ptx: str) -> str:
    """What the oracle says of a kernel at its launch."""
    from sentryward import verify

    facts = json.loads((folder / f"{name}.json").read_text())
    kinds = re.findall(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? \w+", ptx)
    arguments = [
        {"parameter": i, "type": kind, "value": value}
        for i, (kind, value) in enumerate(zip(kinds, facts["values"], strict=False))  # and two of Triton's own
        if value is not None
    ]
    launch = {
        "grid_dim": [facts["grid"], 1, 1],
        "block_dim": [128, 1, 1],
        "cluster_dim": [1, 1, 1],
        "dynamic_shared_bytes": facts["shared"],
    }
    (folder / "kernel.ptx").write_text(ptx)
    configuration = {"schema": "spverify.kernel-input/v1", "launch": launch, "arguments": arguments}
    (folder / "input.json").write_text(json.dumps(configuration))
    return str(verify(folder / "kernel.ptx", input=folder / "input.json", timeout_seconds=120)["result"])


@pytest.mark.parametrize("name", ["forward-1", "forward-3", "backward-1", "backward-3"])
def test_no_schedule_of_the_extended_gemm_has_a_race(name: str, kernels: Path) -> None:
    assert verdict(kernels, name, (kernels / f"{name}.ptx").read_text()) == "race_free"


def test_it_finds_the_race_that_a_barrier_prevents(kernels: Path) -> None:
    ptx = (kernels / "forward-1.ptx").read_text()
    assert BAR.search(ptx)
    assert verdict(kernels, "forward-1", BAR.sub("\n", ptx)) == "potential_race"
