"""What the interpreter's checks are worth: every barrier, fence, wait and ordering of compiled kernels taken away in turn.

A mutant has to be caught, by a fault or by a wrong result. Some orderings have no effect: Triton writes two barriers in
a row, or waits for copies that are there already. They are told from the others by a trace of the whole kernel, not by
what the mutant did: see `Effects`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import environment
import numpy as np
import ptx.launch
import pytest
import torch
from ptx import KernelError
from ptx.launch import Compiled, compile_launch, execute
from ptx.plugin import Executor
from ptx.program import Instruction, Program
from ptx.shared_memory import GRANULE, MANY, NEVER, SharedMemory
from ptx.thread_block import ThreadBlock
from reference import make_case
from torch import Tensor

from lorasb.kernels import launcher, linear, plan
from lorasb.kernels.launcher import Launch
from lorasb.kernels.plan import Plan

pytestmark = pytest.mark.skipif(not environment.PTX, reason="mutates compiled kernels: pytest --ptx sm_86")
MUTATIONS = (
    (r"bar\.sync\s+0;", ""),
    (r"cp\.async\.wait_group\s+(\d+);", "cp.async.wait_group {more};"),
    (r"fence\.proxy\.async\S*;", ""),
    (r"wgmma\.wait_group\.sync\.aligned\s+(\d+);", "wgmma.wait_group.sync.aligned {more};"),
    (r"(atom\.global\.gpu\.)acq_rel", "\\1relaxed"),
)
KILLED = 0.95
SHAPE = (40, 512, 112, 96)  # tokens, in, out, rank: every loop of the kernels goes round several times


@dataclass(frozen=True)
class Mutant:
    """A kernel's text with one of its orderings gone: what it was, its number among its like, and the new text."""

    what: str
    number: int
    ptx: str

    @property
    def opcode(self) -> str:
        """Of the ordering."""
        return self.what.split(" ")[0].rstrip(";")


def mutants(text: str) -> Iterator[Mutant]:
    """Each occurrence of each ordering, taken away or weakened."""
    for pattern, weaker in MUTATIONS:
        for number, match in enumerate(re.finditer(pattern, text)):
            more = str(int(match[1]) + 1) if "{more}" in weaker else ""
            weaker_text = match.expand(weaker.replace("{more}", more))
            what = "atom.global.gpu.acq_rel" if match[0].startswith("atom") else " ".join(match[0].split())
            yield Mutant(what, number, text[: match.start()] + weaker_text + text[match.end() :])


class Interval(NamedTuple):
    """What a block's warps did to shared memory between two barriers: a warp a granule, NEVER, or MANY of them."""

    writers: Any
    readers: Any
    atomics: bool
    accesses: bool

    @classmethod
    def of(cls, shared: SharedMemory, in_flight: Any, atomics: bool, accesses: bool) -> Interval:
        """The interval that ends now. Copies that began in it write for whoever issued them."""
        writers = np.where(shared.write_clock == shared.clock, shared.write_warp, NEVER)
        writers = np.where(shared.in_flight > in_flight, MANY, writers)
        readers = np.where(shared.read_clock == shared.clock, shared.read_warp, NEVER)
        return cls(writers, readers, atomics, accesses)

    def conflicts(self, later: Interval) -> bool:
        """True if different warps touch the same bytes in both, of which one writes; or if programs are ordered."""
        pairs = ((self.writers, later.writers), (self.writers, later.readers), (self.readers, later.writers))
        touched = any(((a != NEVER) & (b != NEVER) & ((a != b) | (a == MANY))).any() for a, b in pairs)
        return touched or (self.accesses and later.atomics) or (self.atomics and later.accesses)


class Effects(ThreadBlock):
    """A block that notes which orderings had something to order.

    A barrier has if the intervals before and after it conflict; a wait, if the weaker one would have left something in
    flight; a fence, if a wgmma reads what was written between the fence before it and it.
    """

    effective: ClassVar[set[int]] = set()  # of instructions, by id
    _barrier: tuple[int, Interval] | None = None
    _fence: int | None = None
    _in_flight: Any = 0
    _atomics = _accesses = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        use = self.shared.use

        def noting(addresses: Any, size: int, where: str) -> None:
            """A wgmma reads: was any of it written since the fence before the last one?"""
            fresh = self.shared.write_fence[addresses.reshape(-1) // GRANULE] == self.shared.fences - 1
            if self._fence is not None and fresh.any():
                self.effective.add(self._fence)
            use(addresses, size, where)

        self.shared.use = noting  # type: ignore[method-assign]

    def _execute(self, instruction: Instruction, head: str, active: Any) -> None:
        parts, key = instruction.parts, id(instruction)
        if head == "bar" and "warp" not in parts:
            self._close(key)
        elif "wait_group" in parts:
            pipeline = self.shared.copies if head == "cp" else self.shared.products
            if len(pipeline.groups) > int(str(instruction.operands[0])):
                self.effective.add(key)
        elif parts[:3] == ("fence", "proxy", "async"):
            self._fence = key
        elif head == "atom":
            self.effective.add(key)
            self._atomics = True
        self._accesses |= head in ("ld", "st", "atom") and parts[1] != "param"
        super()._execute(instruction, head, active)
        if self._places is None and head == "ret":
            self._close(None)

    def _close(self, key: int | None) -> None:
        """The interval between two barriers ends."""
        interval = Interval.of(self.shared, self._in_flight, self._atomics, self._accesses)
        if self._barrier is not None and self._barrier[1].conflicts(interval):
            self.effective.add(self._barrier[0])
        self._barrier = (key, interval) if key is not None else None
        self._in_flight, self._atomics, self._accesses = self.shared.in_flight.copy(), False, False


def has_effect(program: Program, mutant: Mutant) -> bool:
    """True if the ordering that a mutant lacks ordered something in the unchanged kernel."""
    like = [one for one in program.instructions if one.opcode.startswith(mutant.opcode)]
    return id(like[mutant.number]) in Effects.effective


@pytest.fixture
def launches(request: pytest.FixtureRequest) -> list[Launch]:
    """Of a small forward and backward in bf16 with split reductions, several blocks of rows and a bias."""
    executor: Executor = request.config.ptx_executor  # type: ignore[attr-defined]
    M, n, m, r = SHAPE
    case = make_case((M,), n, m, r, torch.bfloat16)
    found: list[Launch] = []

    def keep(kernel: object, grid: int, arguments: dict[str, object], options: dict[str, object]) -> None:
        found.append(Launch(kernel, grid, {k: _copied(v) for k, v in arguments.items()}, options))
        executor.run(kernel, grid, arguments, options)

    plans = {op: plan.choose(plan.Shape(op, "bf16", M, n, m, r), environment.PTX, 1) for op in ("forward", "backward")}
    fused = {op: Plan("fused", chosen.prep, chosen.gemm) for op, chosen in plans.items()}
    members = linear.Members([case.weight], [case.a], [case.core], [case.b], [case.scaling])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "run", keep)
        _, (u,) = linear.forward(case.x, members, [case.bias], fused["forward"])
        linear.backward([case.dy], members, [u], fused["backward"], True, True)
    return found


def _copied(value: object) -> object:
    """Tensors as they are before the launch."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value


def outputs(launch: Launch) -> list[Tensor]:
    """Everything that a launch may write."""
    values = [launch.arguments[name] for name in ("us", "v", "ys", "t", "w", "dcores") if name in launch.arguments]
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]


def run(launch: Launch, compiled: Compiled) -> list[Tensor]:
    """A launch's outputs on copies of its arguments."""
    fresh = replace(launch, arguments={name: _copied(value) for name, value in launch.arguments.items()})
    orders = [list(range(fresh.grid)), list(range(fresh.grid))[::-1]]
    execute(fresh, compiled, orders)
    return outputs(fresh)


def test_orderings_that_are_taken_away_are_missed(
    launches: list[Launch], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = request.config.ptx_executor.driver  # type: ignore[attr-defined]
    killed, survivors, idle = 0, [], 0
    for launch in launches:
        compiled = compile_launch(launch, driver)
        with monkeypatch.context() as patch:
            patch.setattr(ptx.launch, "ThreadBlock", Effects)
            want = run(launch, compiled)
        program = ptx.launch.parsed(compiled.ptx)
        for mutant in mutants(compiled.ptx):
            if not has_effect(program, mutant):
                idle += 1
                continue
            try:
                got = run(launch, replace(compiled, ptx=mutant.ptx))
                caught = not all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            except KernelError:
                caught = True
            killed += caught
            if not caught:
                survivors.append(f"{launch.name}: {mutant.what} #{mutant.number}")
    assert killed >= 40
    assert idle < killed / 2
    assert killed / (killed + len(survivors)) >= KILLED, "\n".join(survivors)
