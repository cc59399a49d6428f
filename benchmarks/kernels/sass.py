"""Machine code of a kernel: instructions with control codes, the main loop, and a simulated multiprocessor.

`cuobjdump -sass` prints two 64-bit words per instruction. Bits 41 to 61 of the second are the control code of Volta and
later: 4 bits of stall cycles, 1 of yield, 3 each of the write and the read barrier, 6 of barriers to wait for, 4 of
reuse. `tensor_share` simulates the main loop by them: warps issue in order, one instruction per scheduler and cycle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

FIRST_WORD = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;?\s*/\*\s*0x[0-9a-f]{16}\s*\*/")
SECOND_WORD = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# by architecture: mma up to sm_90 and on sm_120, wgmma on sm_90, tcgen05 on sm_100, and integers
MMA = re.compile(r"^(HMMA|HGMMA|UTCHMMA|IMMA)\b")
KINDS = {
    "LDSM": "LDSM",
    "LDS": "LDS",
    "STS": "STS",
    "STSM": "STS",
    "LDGSTS": "LDGSTS",
    "LDG": "LDG",
    "STG": "STG",
    "UTMALDG": "TMA",
    "UTMASTG": "TMA",
}
SHARED = ("LDSM", "LDS", "STS", "LDGSTS")  # kinds that take wavefronts of shared memory
NO_BARRIER, BARRIERS = 7, 6
SCHEDULERS = 4  # of a multiprocessor; warp i is scheduled by i mod 4
# Cycles until a result arrives. All data is in shared memory, so no warp waits for memory: shares are upper bounds.
SHARED_LATENCY, GLOBAL_LATENCY, OTHER_LATENCY, READ_LATENCY, BARRIER_LATENCY = 30, 400, 24, 14, 8
ISSUE_INTERVAL = 2  # cycles between a scheduler's memory instructions
QUEUE = 40  # cycles of wavefronts that may wait for shared memory
WARM_UP = 2  # iterations that are not counted, at either end
POLICIES = ("oldest first", "in turns")  # how a scheduler chooses among warps that are ready


@dataclass(frozen=True)
class Instruction:
    """One instruction and its control code."""

    address: int
    text: str
    control: int = 0

    @cached_property
    def opcode(self) -> str:
        """The name with its suffixes, without a predicate."""
        words = PREDICATE.sub("", self.text.strip().lstrip("{").strip()).split()
        return words[0] if words else ""

    @cached_property
    def kind(self) -> str:
        """ "MMA", a kind of memory access, or ""."""
        return "MMA" if MMA.match(self.opcode) else KINDS.get(self.opcode.split(".")[0], "")

    @cached_property
    def stall(self) -> int:
        return max(1, self.control & 15)

    @cached_property
    def write_barrier(self) -> int:
        return self.control >> 5 & 7

    @cached_property
    def read_barrier(self) -> int:
        return self.control >> 8 & 7

    @cached_property
    def waits_for(self) -> tuple[int, ...]:
        return tuple(b for b in range(BARRIERS) if self.control >> 11 + b & 1)

    @cached_property
    def is_program_barrier(self) -> bool:
        return self.opcode.startswith(("BAR.SYNC", "BAR.RED"))

    @cached_property
    def wavefronts(self) -> int:
        """128-byte accesses of shared memory, without bank conflicts."""
        if self.kind == "LDSM":
            return 4 if ".4" in self.opcode else 2 if ".2" in self.opcode else 1
        return 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1


Code = list[Instruction]


def instructions(sass: str) -> Code:
    """All instructions of a dump with one function."""
    code: Code = []
    for line in sass.splitlines():
        first = FIRST_WORD.search(line)
        if first:
            code.append(Instruction(int(first[1], 16), first[2].strip()))
            continue
        second = SECOND_WORD.match(line)
        if second and code:
            control = int(second[1], 16) >> 41 & (1 << 21) - 1
            code[-1] = Instruction(code[-1].address, code[-1].text, control)
    return code


def loops_of(code: Code) -> list[tuple[int, int]]:
    """Find where loops begin and end: at a branch to an earlier instruction."""
    place = {one.address: i for i, one in enumerate(code)}
    loops = []
    for i, one in enumerate(code):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", one.text)
        if target and int(target[1], 16) < one.address and int(target[1], 16) in place:
            loops.append((place[int(target[1], 16)], i + 1))
    return loops


def main_loop(code: Code) -> Code:
    """The innermost loop with the most MMA instructions; empty if there is none."""
    # TF32 counts as a tenth: in a 16-bit kernel it is the unrolled product with R, not the pass over x or W
    count = {loop: sum(_weight(one) for one in code[slice(*loop)]) for loop in loops_of(code)}
    with_mma = [loop for loop, mma in count.items() if mma]
    inner = [
        loop
        for loop in with_mma
        if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in with_mma)
    ]
    best = max(inner, key=count.__getitem__, default=None)
    return code[slice(*best)] if best else []


def _weight(one: Instruction) -> float:
    return 0.0 if one.kind != "MMA" else 0.1 if "TF32" in one.opcode else 1.0


@dataclass
class Warp:
    """The state of a simulated warp."""

    program: int
    at: int = 0
    iteration: int = 0
    ready: int = 0  # cycle
    barriers: list[int] = field(default_factory=lambda: [0] * BARRIERS)  # cycle at which each is released
    is_blocked: bool = False  # at a barrier of its program


@dataclass
class Scheduler:
    """A quarter of a multiprocessor: its warps, and when its tensor core and its memory port are free."""

    warps: list[Warp]
    last: int = 0
    tensor_free: int = 0
    memory_free: int = 0

    def candidates(self, policy: str) -> list[Warp]:
        if policy == "in turns":
            return self.warps[self.last + 1 :] + self.warps[: self.last + 1]
        return [self.warps[self.last], *self.warps[: self.last], *self.warps[self.last + 1 :]]


class Multiprocessor:
    """A simulated multiprocessor: all warps of its programs execute a loop, cycle by cycle."""

    def __init__(self, loop: Code, warps: int, programs: int, mma_cycles: int, policy: str) -> None:
        self.loop, self.warps_per_program, self.mma_cycles, self.policy = loop, warps, mma_cycles, policy
        self.warps = [Warp(w // warps) for w in range(warps * programs)]
        self.schedulers = [Scheduler(self.warps[i::SCHEDULERS]) for i in range(min(SCHEDULERS, len(self.warps)))]
        self.shared_free, self.tensor_cycles = 0.0, 0
        self.arrived: dict[tuple[int, int, int], list[Warp]] = defaultdict(list)
        self.marks: list[tuple[int, int]] = []  # (cycle, tensor cycles) at the end of the first warp's iterations

    def run(self, iterations: int) -> None:
        """Run until every warp has done `iterations` iterations."""
        cycle = 0
        while any(warp.iteration < iterations for warp in self.warps):
            for scheduler in self.schedulers:
                for warp in scheduler.candidates(self.policy):
                    if warp.iteration < iterations and self._can_issue(scheduler, warp, cycle):
                        self._issue(scheduler, warp, cycle)
                        break
            cycle += 1

    def _can_issue(self, scheduler: Scheduler, warp: Warp, cycle: int) -> bool:
        if warp.is_blocked or warp.ready > cycle:
            return False
        one = self.loop[warp.at]
        if any(warp.barriers[b] > cycle for b in one.waits_for):
            return False
        if one.kind == "MMA":
            return scheduler.tensor_free <= cycle
        return not one.kind or (scheduler.memory_free <= cycle and self.shared_free <= cycle + QUEUE)

    def _issue(self, scheduler: Scheduler, warp: Warp, cycle: int) -> None:
        one = self.loop[warp.at]
        arrives = cycle + self._latency(scheduler, one, cycle)
        if one.write_barrier != NO_BARRIER:
            warp.barriers[one.write_barrier] = max(warp.barriers[one.write_barrier], arrives)
        if one.read_barrier != NO_BARRIER:
            warp.barriers[one.read_barrier] = max(warp.barriers[one.read_barrier], cycle + READ_LATENCY)
        warp.ready = cycle + one.stall
        if one.is_program_barrier:
            self._arrive(warp, cycle)
        warp.at += 1
        if warp.at == len(self.loop):
            warp.at, warp.iteration = 0, warp.iteration + 1
            if warp is self.warps[0]:
                self.marks.append((cycle, self.tensor_cycles))
        scheduler.last = scheduler.warps.index(warp)

    def _latency(self, scheduler: Scheduler, one: Instruction, cycle: int) -> int:
        """Cycles until the result arrives; occupies the unit that executes the instruction."""
        if one.kind == "MMA":
            scheduler.tensor_free = max(scheduler.tensor_free, cycle) + self.mma_cycles
            self.tensor_cycles += self.mma_cycles
        elif one.kind in SHARED:
            scheduler.memory_free = cycle + ISSUE_INTERVAL
            self.shared_free = max(self.shared_free, cycle) + one.wavefronts
            return int(SHARED_LATENCY + self.shared_free - cycle)
        return GLOBAL_LATENCY if one.kind == "LDG" else OTHER_LATENCY

    def _arrive(self, warp: Warp, cycle: int) -> None:
        """Wait at a barrier for the program's other warps."""
        key = warp.program, warp.at, warp.iteration
        waiting = self.arrived[key]
        waiting.append(warp)
        warp.is_blocked = True
        if len(waiting) == self.warps_per_program:
            for other in self.arrived.pop(key):
                other.is_blocked, other.ready = False, max(other.ready, cycle + BARRIER_LATENCY)


def tensor_share(loop: Code, warps: int, programs: int, mma_cycles: int, policy: str, iterations: int = 16) -> float:
    """Share of cycles in which the tensor cores are busy, in 0..1, if memory never makes a warp wait: an upper bound.

    Args:
        loop: of `main_loop`, with mma.sync instructions.
        warps: per program.
        programs: on the multiprocessor.
        mma_cycles: cycles that one MMA instruction occupies a scheduler's tensor core.
        policy: one of `POLICIES`.
        iterations: how many each warp runs.
    """
    machine = Multiprocessor(loop, warps, programs, mma_cycles, policy)
    machine.run(iterations)
    (first, busy_before), (last, busy_after) = machine.marks[WARM_UP], machine.marks[-WARM_UP]
    return (busy_after - busy_before) / (SCHEDULERS * (last - first))
