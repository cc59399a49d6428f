"""Every kernel of every shipped configuration executes: the first and the last program of its grid, over memory without
bytes. No instruction is unknown and every check holds, but for those of values.
"""

from __future__ import annotations

from collections.abc import Iterator

import environment
import pytest
from ptx.launch import compile_launch
from ptx.metered import work_of
from ptx.plugin import Executor

from benchmarks.kernels import static_report
from benchmarks.kernels.static_report import DTYPES, config_name, launch_key
from lorasb.kernels.launcher import Launch

pytestmark = [
    pytest.mark.skipif(not environment.PTX, reason="executes compiled kernels: pytest --ptx sm_86"),
    pytest.mark.long,
]


def launches(dtype: str, arch: str) -> Iterator[tuple[str, Launch]]:
    """Names and launches of all kernels for an architecture that differ."""
    known = set()
    for job in static_report.jobs([arch]):
        if DTYPES[job.dtype] != dtype:
            continue
        for launch in static_report.launches_of(job):
            key = launch_key(launch)
            if key not in known:
                known.add(key)
                yield f"{launch.name} ({job.variant.label}, {config_name(launch)})", launch


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_kernel_executes(dtype: str, executor: Executor) -> None:
    failed, count = [], 0
    for name, launch in launches(dtype, executor.arch):
        programs = sorted({0, launch.grid - 1})
        try:
            work = work_of(launch, compile_launch(launch, executor.driver), programs)
            assert work.issue_slots > 0
        except Exception as error:
            failed.append(f"{name}: {error}")
        count += 1
    assert not failed, "\n".join(failed)
    assert count >= 20
