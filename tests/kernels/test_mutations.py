"""Remove or weaken each barrier, fence, wait and ordering of compiled kernels in turn: a fault or a wrong result has to
reveal it. Some order nothing, so that results stay equal: their number per launch is recorded for one Triton version.
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace

import environment
import pytest
import torch
import triton
from calls import operands_of
from kernel_cases import group_cases
from torch import Tensor

from benchmarks.kernels.ptx import KernelError
from benchmarks.kernels.ptx.launch import Compiled, compile_launch, execute
from benchmarks.kernels.ptx.plugin import Executor
from lorasb.backends.triton import members_of
from lorasb.kernels import launcher, linear, plan
from lorasb.kernels.launcher import Launch

pytestmark = pytest.mark.skipif(not environment.PTX, reason="mutates compiled kernels: pytest --ptx sm_86")
MUTATIONS = (
    (r"bar\.sync\s+0;", ""),
    (r"cp\.async\.wait_group\s+(\d+);", "cp.async.wait_group {more};"),
    (r"fence\.proxy\.async\S*;", ""),
    (r"wgmma\.wait_group\.sync\.aligned\s+(\d+);", "wgmma.wait_group.sync.aligned {more};"),
    (r"(atom\.global\.gpu\.)acq_rel", "\\1relaxed"),
    (r"griddepcontrol\.wait\s*;", ""),
)


# tokens, in and out features, rank and dropout of calls in which every loop of the kernels runs several iterations
CALLS: dict[str, tuple[int, int, tuple[int, ...], int, float]] = {
    "a layer": (40, 512, (112,), 96, 0.0),
    "one token": (1, 4096, (512,), 96, 0.0),
    "a group with dropout": (40, 512, (112, 208), 96, 0.25),
}


# Number of mutants that change nothing, by launch and kind in MUTATIONS: accesses before and after the barrier do not
# conflict, or nothing that the weaker wait leaves in flight is touched before the next wait ends it
TRITON = "3.9.0"
IDLE = {
    ("sm_86", "a layer"): [[4, 0, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0], [2, 6, 0, 0, 0, 0]],
    ("sm_86", "one token"): [[3, 0, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [4, 6, 0, 0, 0, 0]],
    ("sm_86", "a group with dropout"): [
        [5, 0, 0, 0, 0, 0],
        [1, 3, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0],
        [4, 12, 0, 0, 0, 0],
    ],
    ("sm_90", "a layer"): [[5, 0, 3, 2, 0, 0], [2, 0, 0, 1, 0, 0], [5, 0, 3, 2, 0, 0], [2, 0, 0, 1, 0, 0]],
    ("sm_90", "one token"): [[3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]],
    ("sm_90", "a group with dropout"): [
        [5, 0, 9, 10, 0, 0],
        [2, 0, 0, 1, 0, 0],
        [1, 0, 3, 2, 0, 0],
        [2, 0, 0, 1, 0, 0],
    ],
    ("sm_120", "a layer"): [[4, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    ("sm_120", "one token"): [[3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]],
    ("sm_120", "a group with dropout"): [
        [8, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0],
    ],
}
IDLE |= {(arch, call): IDLE["sm_86", call] for arch in ("sm_80", "sm_89") for call in CALLS}


def mutants(text: str) -> Iterator[tuple[int, str]]:
    """Yield each mutant: the number of its kind, and the kernel's text with one ordering removed or weakened."""
    for kind, (pattern, weaker) in enumerate(MUTATIONS):
        for match in re.finditer(pattern, text):
            more = str(int(match[1]) + 1) if "{more}" in weaker else ""
            yield kind, text[: match.start()] + match.expand(weaker.replace("{more}", more)) + text[match.end() :]


def launches_of(call: str, executor: Executor) -> list[Launch]:
    """Launches of a small bf16 forward and backward, most with split reductions, several row blocks and a bias."""
    M, n, ms, r, dropout = CALLS[call]
    cases = group_cases(M, n, ms, r, torch.bfloat16)
    found: list[Launch] = []

    def keep(call: Launch) -> None:
        found.append(_with_copies(call))
        executor.run(call)

    shapes = (plan.Shape(op, "bf16", M, n, sum(ms), r, len(ms)) for op in ("forward", "backward"))
    forward, backward = (plan.choose(shape, environment.PTX, 1) for shape in shapes)
    members, mask = members_of(operands_of(*cases)), linear.Mask(dropout, tuple(range(len(ms))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "run", keep)
        _, us = linear.forward(cases[0].x, members, forward, mask)
        linear.backward([c.dy for c in cases], members, us, backward, True, True, mask)
    return found


def _with_copies(launch: Launch) -> Launch:
    """Copy the launch's tensors as they are now."""
    return launch._replace(arguments=deepcopy(launch.arguments))


def outputs(launch: Launch) -> list[Tensor]:
    """Return everything that a launch writes; in a forward, `dcores` is a dummy."""
    names = ["us", "v", "ys", "t", "w", *(["dcores"] if launch.arguments.get("core_programs") else [])]
    values = [launch.arguments[name] for name in names if name in launch.arguments]
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]


def same_bits(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Return True if all outputs have the same bytes, also for NaN."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results, wanted, strict=True))


def run(launch: Launch, compiled: Compiled) -> list[Tensor]:
    """Run a launch on copies of its arguments, and return its outputs."""
    fresh = _with_copies(launch)
    orders = [list(range(fresh.grid)), list(range(fresh.grid))[::-1]]
    late = [fresh.arguments[name] for name in ("v", "t", "partial", "counters") if launch.overlaps]
    execute(fresh, compiled, orders, {tensor.untyped_storage().data_ptr() for tensor in late})
    return outputs(fresh)


@pytest.mark.parametrize("call", CALLS)
def test_orderings_that_are_taken_away_are_missed(call: str, executor: Executor) -> None:
    launches = launches_of(call, executor)
    idle, caught = [[0] * len(MUTATIONS) for _ in launches], 0
    for launch, count in zip(launches, idle, strict=True):
        compiled = compile_launch(launch, executor.driver)
        want = run(launch, compiled)
        for kind, text in mutants(compiled.ptx):
            try:
                is_idle = same_bits(run(launch, replace(compiled, ptx=text)), want)
            except KernelError:
                is_idle = False
            count[kind] += is_idle
            caught += not is_idle
    if triton.__version__ == TRITON:
        assert idle == IDLE.get((executor.arch, call), idle)
    assert caught >= 40
    assert sum(map(sum, idle)) < caught / 2
