"""One program (thread block): its registers, its instructions in lockstep, and threads that diverge at a branch.

While all threads are at the same instruction, it is one step on vectors over the threads. After a branch diverges, the
threads that are farthest back continue until all meet again, as they always do in structured code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import arithmetic, formats
from .arithmetic import FUNCTIONS
from .formats import BITS, TYPES, Array
from .global_memory import GlobalMemory
from .instructions import HANDLERS, WARP
from .program import Instruction, KernelError, Program
from .shared_memory import Pipeline, SharedMemory

STEPS = 10**7  # more indicate an endless loop
DYNAMIC_SHARED = "global_smem"  # Triton's name for the block's shared memory, which begins at 0


@dataclass
class Fragments(Pipeline):
    """Registers of wgmma in flight: sums that it writes, and operands that it reads, until a wait."""

    sums: set[str] = field(default_factory=set)
    operands: set[str] = field(default_factory=set)

    def use(self, sums: Sequence[str], operands: Sequence[str]) -> None:
        """Begin a wgmma."""
        self.open.append((sums, operands))
        self.sums.update(sums)
        self.operands.update(operands)

    def wait(self, pending: int) -> list[Any]:
        """wgmma.wait_group: finish all groups but the last `pending`."""
        finished = super().wait(pending)
        self.sums = {name for sums, _ in self.unfinished for name in sums}
        self.operands = {name for _, operands in self.unfinished for name in operands}
        return finished


class ThreadBlock:
    """A thread block that is executed once: program `number` of a grid."""

    def __init__(
        self, program: Program, memory: GlobalMemory, shared: int, values: dict[int, Any], number: int, grid: int
    ) -> None:
        self.program, self.memory, self.values, self.number = program, memory, values, number
        self.threads = program.threads
        self.lanes = np.arange(self.threads)
        self.warps = (self.lanes // WARP).astype(np.int32)
        self.shared = SharedMemory(shared)
        self.fragments = Fragments()
        special = {
            "%tid.x": self.lanes,
            "%laneid": self.lanes % WARP,
            "%ntid.x": self.threads,
            "%ctaid.x": number,
            "%nctaid.x": grid,
        }
        self.registers: dict[str, Array] = {
            name: np.full(self.threads, value, np.uint32) for name, value in special.items()
        }
        self._at = program.instructions[0]
        self._places: Array | None = None  # each thread's next instruction, while threads diverge
        memory.begin(self)

    def run(self) -> None:
        """Execute from the first instruction to the return of all threads; a fault names the instruction."""
        try:
            with np.errstate(all="ignore"):
                self._run()
        except KernelError as error:
            raise KernelError(f"{error}, at `{self._at.text[:100]}` (program {self.number})") from None

    def _run(self) -> None:
        instructions, at = self.program.instructions, 0
        end = len(instructions)
        for _ in range(STEPS):
            if self._places is not None:
                at = int(self._places.min())
            if at >= end:
                self.shared.finish()
                return
            at = self._step(instructions[at], at)
        raise KernelError(f"{self.program.name} takes more than {STEPS} steps: an endless loop?")

    def _step(self, instruction: Instruction, at: int) -> int:
        """Execute an instruction for the threads that are at it; return where `_run` continues."""
        self._at = instruction
        here = None if self._places is None else self._places == at
        active = self._guarded(instruction, here)
        self._issued(instruction, here)
        head, target = instruction.parts[0], at + 1
        if head == "bra":
            target = self.program.labels[str(instruction.operands[0])]
        elif head in ("ret", "exit"):
            target = len(self.program.instructions)
        else:
            if active is None or active.any():
                self._execute(instruction, head, active)
            active = here
        return self._go(active, here, target, at)

    def _issued(self, instruction: Instruction, here: Array | None) -> None:
        """Hook for subclasses that count: some threads (None: all) are at an instruction, whatever its guard."""

    def _execute(self, instruction: Instruction, head: str, active: Array | None) -> None:
        if head in FUNCTIONS:
            self._arithmetic(instruction, active)
            return
        if head not in HANDLERS:
            raise instruction.unknown()
        HANDLERS[head](self, instruction, active)

    def _guarded(self, instruction: Instruction, here: Array | None) -> Array | None:
        """The threads that execute the instruction; None for all."""
        if instruction.guard is None:
            return here
        mask = self.predicate(instruction.guard)
        return mask if here is None else mask & here

    def _go(self, active: Array | None, here: Array | None, target: int, at: int) -> int:
        """Send the active threads to `target`, the others here to the next; return where `_run` continues."""
        if here is None and (active is None or active.all()):
            return target
        places = np.full(self.threads, at) if self._places is None else self._places
        moving = np.ones(self.threads, bool) if here is None else here
        jumping = moving if active is None else active
        places = np.where(jumping, target, np.where(moving, at + 1, places))
        together = (places == places[0]).all()
        self._places = None if together else places
        return int(places[0])

    # registers

    def get(self, operand: Any, dtype: Any) -> Array:
        """An operand's value for every thread."""
        if dtype is bool:
            return self.predicate(operand)
        name = str(operand)
        if name[0] != "%":
            return np.full(self.threads, self._constant(name, dtype))
        if name in self.fragments.sums:
            raise KernelError(f"read of {name}, which a wgmma in flight adds to")
        value = self._register(name)
        wanted = np.dtype(dtype)
        if value.dtype == wanted:
            return value
        if value.dtype.itemsize == wanted.itemsize:
            return value.view(wanted)
        return value.astype(BITS[wanted.itemsize]).view(wanted)

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            raise KernelError(f"read of {name} before it was written")
        return self.registers[name]

    def packed(self, operand: Any, dtype: Any) -> Array:
        """A part of a packed register. For a half that nothing uses, LLVM packs a register that is never written: it
        reads as all ones, a NaN, which would show in a result."""
        if str(operand) in self.registers or str(operand) in self.program.targets:
            return self.get(operand, dtype)
        return np.full(self.threads, np.iinfo(dtype).max, dtype)

    def dtype_of(self, instruction: Instruction) -> Any:
        """The numpy dtype of an instruction's last modifier."""
        if instruction.kind not in TYPES:
            raise instruction.unknown()
        return TYPES[instruction.kind]

    def _constant(self, name: str, dtype: Any) -> Any:
        if name == DYNAMIC_SHARED:
            return dtype(0)
        if name in self.program.parameters:
            return dtype(self.program.parameters[name].place)
        return formats.immediate(name, dtype)

    def predicate(self, operand: Any) -> Array:
        """A predicate's value for every thread."""
        name = str(operand)
        if name in ("0", "1", "-1"):
            return np.full(self.threads, name != "0")
        if name[0] == "!":
            return ~self.predicate(name[1:])
        return self._register(name)

    def get_all(self, operands: Sequence[str], dtype: Any) -> Array:
        """Values [threads, n] of several operands."""
        return np.stack([self.get(operand, dtype) for operand in operands], 1)

    def put_all(self, operands: Sequence[str], values: Array, active: Array | None = None) -> None:
        """Write registers from values [threads, n]."""
        for i, operand in enumerate(operands):
            self.put(operand, values[:, i], active)

    def put(self, operand: Any, value: Array, active: Array | None) -> None:
        """Write a register of the active threads."""
        name = str(operand)
        if name == "_":
            return
        if name in self.fragments.sums or name in self.fragments.operands:
            raise KernelError(f"write of {name}, which a wgmma in flight uses")
        if value.dtype != bool:
            value = np.ascontiguousarray(value)
            value = value.view(BITS[value.dtype.itemsize])
        if active is not None and not active.all():
            former = self.registers.get(name)
            former = np.zeros_like(value) if former is None or former.dtype != value.dtype else former
            value = np.where(active, value, former)
        self.registers[name] = value

    def chosen(self, active: Array | None) -> Array:
        """Numbers of the active threads."""
        return self.lanes if active is None else np.nonzero(active)[0]

    def memory_of(self, instruction: Instruction) -> tuple[Any, Any]:
        """The memory that a load or store goes to, and the dtype of its addresses."""
        if instruction.parts[1].startswith("shared"):
            return self.shared, np.uint32
        return self.memory, np.uint64

    def addresses(self, operand: Any, dtype: Any, threads: Array) -> Array:
        """Byte addresses of a memory operand, for these threads."""
        return self.get(operand.base, dtype)[threads].astype(np.int64) + operand.offset

    def whole_warps(self, active: Array | None) -> None:
        """Refuse a warp-wide instruction that only some lanes of a warp execute."""
        if active is not None and not (active.reshape(-1, WARP).all(1) == active.reshape(-1, WARP).any(1)).all():
            raise KernelError("an instruction of whole warps where some lanes are elsewhere")

    def all_threads(self, active: Array | None) -> None:
        """Refuse a block-wide instruction that only some threads execute."""
        if active is not None and not active.all():
            raise KernelError("an instruction of all threads where some are elsewhere")

    # instructions

    def _arithmetic(self, instruction: Instruction, active: Array | None) -> None:
        target, *sources = instruction.operands
        dtype, values = self._values(instruction, sources)
        result = FUNCTIONS[instruction.parts[0]](instruction.parts, dtype, *values)
        if instruction.kind == "f32x2":
            result = np.ascontiguousarray(result).view(np.uint64)
        self.put(target, result, active)

    def _values(self, instruction: Instruction, sources: list[Any]) -> tuple[Any, list[Array]]:
        """The dtype that an arithmetic instruction computes in, and its operands."""
        parts, kind = instruction.parts, instruction.kind
        if kind == "f32x2":  # two fp32 in each 64-bit register, as Blackwell computes them: add, sub, mul, fma
            return np.float32, [np.ascontiguousarray(self.get(one, np.uint64)).view(np.float32) for one in sources]
        if parts[-2:] in (("f32", "bf16"), ("f32", "f16")):  # also on Blackwell: all operands but the last have 16 bits
            widen = formats.from_bf16 if kind == "bf16" else formats.from_f16
            halves = [widen(self.get(source, np.uint16)) for source in sources[:-1]]
            return np.float32, [*halves, self.get(sources[-1], np.float32)]
        dtype = self.dtype_of(instruction)
        others = arithmetic.OPERANDS.get(parts[0], {})
        kinds = [others.get(i, dtype) for i in range(len(sources))]
        if parts[:2] == arithmetic.WIDE_ADDEND:
            kinds[2] = formats.WIDER[dtype]
        return dtype, list(map(self.get, sources, kinds))
