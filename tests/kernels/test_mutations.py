"""Every barrier, fence, wait and ordering of compiled kernels taken away in turn: a fault or a wrong result has to show
it. Those that order nothing, as a trace of the whole kernel says (`Effects`), have to give the same bits without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import environment
import numpy as np
import pytest
import torch
from calls import operands_of
from kernel_cases import group_cases
from torch import Tensor

from benchmarks.kernels.ptx import KernelError
from benchmarks.kernels.ptx import launch as ptx_launch
from benchmarks.kernels.ptx.launch import Compiled, compile_launch, execute, parsed
from benchmarks.kernels.ptx.plugin import Executor
from benchmarks.kernels.ptx.program import Address, Instruction, Program, members
from benchmarks.kernels.ptx.shared_memory import GRANULE, MANY, NEVER, Copy, SharedMemory
from benchmarks.kernels.ptx.thread_block import ThreadBlock
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
)


# tokens, in and out features, rank and dropout of calls in which every loop of the kernels goes round several times
CALLS: dict[str, tuple[int, int, tuple[int, ...], int, float]] = {
    "a layer": (40, 512, (112,), 96, 0.0),
    "one token": (1, 4096, (512,), 96, 0.0),
    "a group with dropout": (40, 512, (112, 208), 96, 0.25),
}


@dataclass(frozen=True)
class Mutant:
    """A kernel's text with one of its orderings gone: what it was, its number among its like, and the new text."""

    what: str
    number: int
    ptx: str


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
    copied: Any
    readers: Any
    atomics: bool
    accesses: bool

    @classmethod
    def of(cls, shared: SharedMemory, copies: list[Copy], atomics: bool, accesses: bool) -> Interval:
        """The interval that ends now, in which these copies began."""
        writers = np.where(shared.write_clock == shared.clock, shared.write_warp, NEVER)
        readers = np.where(shared.read_clock == shared.clock, shared.read_warp, NEVER)
        copied = writers.copy()
        for copy in copies:
            for warp, granules in zip(copy.warps, copy.granules, strict=True):
                copied[granules] = warp
        return cls(writers, copied, readers, atomics, accesses)

    def conflicts(self, later: Interval) -> bool:
        """True if different warps touch the same bytes in both, of which one writes; or if programs are ordered."""
        pairs = ((self.writers, later.copied), (self.writers, later.readers), (self.readers, later.copied))
        touched = any(((a != NEVER) & (b != NEVER) & ((a != b) | (a == MANY))).any() for a, b in pairs)
        return touched or (self.accesses and later.atomics) or (self.atomics and later.accesses)


class Left(NamedTuple):
    """What a weaker wait would have left in flight: the wait, its shared memory, and the registers of its wgmma."""

    key: int
    granules: Any
    products: Sequence[tuple[Sequence[str], Sequence[str]]] = ()

    def is_touched(self, instruction: Instruction) -> bool:
        """True if an instruction uses sums, or writes operands, before they are there."""
        if instruction.parts[0] == "wgmma" or not instruction.operands:
            return False
        written, *others = map(names_of, instruction.operands)
        sums = {name for sums, _ in self.products for name in sums}
        operands = {name for _, operands in self.products for name in operands}
        return not (written | set().union(*others)).isdisjoint(sums) or not written.isdisjoint(operands)


def names_of(operand: Any) -> set[str]:
    """The registers of an operand."""
    if isinstance(operand, Address):
        return {operand.base}
    return set(map(str, members(operand)))


class Watched(SharedMemory):
    """Shared memory that tells its block of every access."""

    def __init__(self, size: int, block: Effects) -> None:
        super().__init__(size)
        self.block = block

    def use(self, addresses: Any, size: int) -> None:
        """A wgmma reads: was any of it written since the fence before the last one?"""
        granules = addresses.reshape(-1) // GRANULE
        if self.block.fence is not None and (self.write_fence[granules] == self.fences - 1).any():
            self.block.effective.add(self.block.fence)
        self.block.note("cp", granules)
        super().use(addresses, size)

    def _check(self, *access: Any) -> Any:
        granules = super()._check(*access)
        self.block.note("cp", granules)
        return granules

    def _check_write(self, *access: Any) -> Any:
        granules = super()._check_write(*access)
        self.block.note("wgmma", granules)
        return granules


class Effects(ThreadBlock):
    """A block that notes which orderings had something to order."""

    effective: ClassVar[set[int]] = set()  # of instructions, by id
    fence: int | None = None
    _barrier: tuple[int, Interval] | None = None
    _former: Sequence[Copy] = ()
    _atomics = _accesses = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shared = Watched(len(self.shared.bytes), self)
        self._left: dict[str, Left] = {}  # by what was waited for, cp.async or wgmma

    def note(self, what: str, granules: Any) -> None:
        """An access: would a weaker wait have left a copy to there in flight, or a wgmma that reads what is written?"""
        if what in self._left and np.isin(granules, self._left[what].granules).any():
            self.effective.add(self._left[what].key)

    def _execute(self, instruction: Instruction, head: str, active: Any) -> None:
        parts, key = instruction.parts, id(instruction)
        if head == "bar" and "warp" not in parts:
            self._close(key)
        elif "wait_group" in parts:
            self._wait(head, key, instruction.number())
        elif "wgmma" in self._left and self._left["wgmma"].is_touched(instruction):
            self.effective.add(self._left["wgmma"].key)
        elif parts[:3] == ("fence", "proxy", "async"):
            self.fence = key
        elif head == "atom":
            self.effective.add(key)
            self._atomics = True
        self._accesses |= head in ("ld", "st", "atom") and parts[1] != "param"
        super()._execute(instruction, head, active)

    def run(self) -> None:
        """The block's end closes what is open."""
        super().run()
        self._close(None)
        if "wgmma" in self._left:
            self.effective.add(self._left["wgmma"].key)

    def _wait(self, head: str, key: int, pending: int) -> None:
        """Remember what a weaker wait would have left, and forget what this one would end anyway."""
        groups = (self.shared.products if head == "wgmma" else self.shared.copies).groups
        if head in self._left and len(groups) >= pending + (key == self._left[head].key):
            del self._left[head]
        if len(groups) > pending and (group := groups[-pending - 1]):
            if head == "wgmma":
                self._left[head] = Left(key, np.concatenate(group), self.fragments.groups[-pending - 1])
            else:
                self._left[head] = Left(key, np.concatenate([copy.granules.ravel() for copy in group]))

    def _close(self, key: int | None) -> None:
        """The interval between two barriers ends."""
        copies = self.shared.copies.unfinished
        new = [copy for copy in copies if not any(copy is one for one in self._former)]
        interval = Interval.of(self.shared, new, self._atomics, self._accesses)
        if self._barrier is not None and self._barrier[1].conflicts(interval):
            self.effective.add(self._barrier[0])
        self._barrier = (key, interval) if key is not None else None
        self._former, self._atomics, self._accesses = copies, False, False


def has_effect(program: Program, mutant: Mutant) -> bool:
    """True if the ordering that a mutant lacks ordered something in the unchanged kernel."""
    opcode = mutant.what.split(" ")[0].rstrip(";")
    like = [one for one in program.instructions if one.opcode.startswith(opcode)]
    return id(like[mutant.number]) in Effects.effective


@pytest.fixture(params=CALLS)
def launches(request: pytest.FixtureRequest, executor: Executor) -> list[Launch]:
    """Of a small forward and backward in bf16, most with split reductions, several blocks of rows and a bias."""
    M, n, ms, r, dropout = CALLS[request.param]
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
    """Its tensors as they are now."""
    return launch._replace(arguments=deepcopy(launch.arguments))


def outputs(launch: Launch) -> list[Tensor]:
    """Everything that a launch writes; forward, `dcores` stands for nothing."""
    names = ["us", "v", "ys", "t", "w", *(["dcores"] if launch.arguments.get("core_programs") else [])]
    values = [launch.arguments[name] for name in names if name in launch.arguments]
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]


def same_bits(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether all outputs have the same bytes, NaN or not."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results, wanted, strict=True))


def run(launch: Launch, compiled: Compiled) -> list[Tensor]:
    """A launch's outputs on copies of its arguments."""
    fresh = _with_copies(launch)
    orders = [list(range(fresh.grid)), list(range(fresh.grid))[::-1]]
    execute(fresh, compiled, orders)
    return outputs(fresh)


def test_orderings_that_are_taken_away_are_missed(
    launches: list[Launch], executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, survivors, idle, wrong = 0, [], 0, []
    for launch in launches:
        compiled = compile_launch(launch, executor.driver)
        with monkeypatch.context() as patch:
            patch.setattr(ptx_launch, "ThreadBlock", Effects)
            want = run(launch, compiled)
        assert same_bits(run(launch, compiled), want)
        program = parsed(compiled.ptx)
        for mutant in mutants(compiled.ptx):
            effect, said = has_effect(program, mutant), ""
            try:
                caught = not same_bits(run(launch, replace(compiled, ptx=mutant.ptx)), want)
            except KernelError as error:
                caught, said = True, str(error)
            name = f"{launch.name}: {mutant.what} #{mutant.number} {said}"
            if effect or "still in flight at the end" in said:  # a copy that nothing reads is a fault, too
                killed += caught
                survivors += [] if caught else [name]
            else:
                idle += 1
                wrong += [name] if caught else []
    assert killed >= 40
    assert idle < killed / 2
    assert not survivors, "\n".join(survivors)
    assert not wrong, "called idle:\n" + "\n".join(wrong)
