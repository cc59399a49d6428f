"""One program (thread block): its registers, its instructions in lockstep, and threads that part at a branch.

While all threads are at one instruction, each instruction is one step on vectors over the threads. Where a branch
divides them, the threads that are farthest back go on until all meet again, as structured code always does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arithmetic, formats
from .arithmetic import FUNCTIONS
from .faults import KernelError
from .formats import BITS, TYPES, Array
from .global_memory import GlobalMemory
from .instructions import HANDLERS, WARP
from .program import Instruction, Program
from .shared_memory import Pipeline, SharedMemory

STEPS = 10**7  # more are an endless loop
DYNAMIC_SHARED = "global_smem"  # Triton's name of the block's shared memory, which begins at 0


@dataclass(frozen=True)
class Place:
    """Which program of which launch this is."""

    program: int
    grid: int


class Fragments:
    """Registers of wgmma in flight: sums that it writes, and operands that it reads, until a wait."""

    def __init__(self) -> None:
        self.sums: set[str] = set()
        self.operands: set[str] = set()
        self._products = Pipeline()

    def use(self, sums: Sequence[str], operands: Sequence[str]) -> None:
        """A wgmma begins."""
        self._products.open.append((sums, operands))
        self.sums.update(sums)
        self.operands.update(operands)

    @property
    def groups(self) -> list[list[tuple[Sequence[str], Sequence[str]]]]:
        """Sums and operands of the products of each group in flight."""
        return self._products.groups

    def commit(self) -> None:
        """Close the open group."""
        self._products.commit()

    def wait(self, pending: int) -> None:
        """wgmma.wait_group: what is left is that of the last groups."""
        self._products.wait(pending)
        left = [product for group in (*self._products.groups, self._products.open) for product in group]
        self.sums = {name for sums, _ in left for name in sums}
        self.operands = {name for _, operands in left for name in operands}


class ThreadBlock:
    """A thread block that is executed once."""

    def __init__(
        self, program: Program, memory: GlobalMemory, shared: int, values: dict[str, Any], place: Place
    ) -> None:
        self.program, self.memory, self.values, self.place = program, memory, values, place
        self.threads = program.threads
        self.lanes = np.arange(self.threads)
        self.warps = (self.lanes // WARP).astype(np.int32)
        self.shared = SharedMemory(shared)
        self.fragments = Fragments()
        self.registers: dict[str, Array] = {}
        self.counts: Counter[str] = Counter()
        self._at: Instruction | None = None
        self._places: Array | None = None  # each thread's next instruction, while they are apart
        memory.clocks.begin()

    @property
    def where(self) -> str:
        """The instruction that is executed, for messages."""
        text = self._at.text[:100] if self._at is not None else "the beginning"
        return f"`{text}` (program {self.place.program})"

    def run(self) -> None:
        """Execute from the first instruction to the return of all threads."""
        instructions, at = self.program.instructions, 0
        end = len(instructions)
        for _ in range(STEPS):
            if self._places is not None:
                at = int(self._places.min())
            if at >= end:
                self.shared.finish(self.program.name)
                return
            at = self._step(instructions[at], at)
        raise KernelError(f"{self.program.name} takes more than {STEPS} steps: an endless loop?")

    def _step(self, instruction: Instruction, at: int) -> int:
        """Execute an instruction for the threads that are there; the next one of theirs."""
        self._at = instruction
        self.counts[instruction.opcode] += 1
        here = None if self._places is None else self._places == at
        active = self._guarded(instruction, here)
        self._issued(instruction, here)
        head = instruction.parts[0]
        if head in ("bra", "ret", "exit"):
            target = len(self.program.instructions) if head != "bra" else self._label(instruction)
            return self._jump(active, here, target, at)
        if active is None or active.any():
            self._execute(instruction, head, active)
        return self._advance(here, at)

    def _issued(self, instruction: Instruction, here: Array | None) -> None:
        """An instruction that some threads (None: all) are at, whatever its guard says; for subclasses that count."""

    def _execute(self, instruction: Instruction, head: str, active: Array | None) -> None:
        if head in FUNCTIONS:
            self._arithmetic(instruction, active)
            return
        handler = HANDLERS.get(head)
        if handler is None:
            raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")
        handler(self, instruction, active)

    def _guarded(self, instruction: Instruction, here: Array | None) -> Array | None:
        """The threads that execute it; None for all."""
        if instruction.guard is None:
            return here
        mask = self.predicate(instruction.guard.register)
        mask = ~mask if instruction.guard.negated else mask
        return mask if here is None else mask & here

    def _label(self, instruction: Instruction) -> int:
        return self.program.labels[str(instruction.operands[0])]

    def _jump(self, active: Array | None, here: Array | None, target: int, at: int) -> int:
        """Send the active threads to `target`, and the others that are here on."""
        if here is None and (active is None or active.all()):
            return target
        if here is None and active is not None and not active.any():
            return at + 1
        places = np.full(self.threads, at) if self._places is None else self._places
        moving = np.ones(self.threads, bool) if here is None else here
        jumping = moving if active is None else active
        self._places = np.where(jumping, target, np.where(moving, at + 1, places))
        return self._meet(at)

    def _advance(self, here: Array | None, at: int) -> int:
        if self._places is None or here is None:
            return at + 1
        self._places = np.where(here, at + 1, self._places)
        return self._meet(at)

    def _meet(self, at: int) -> int:
        """One place again, where all threads are at the same instruction."""
        places = self._places
        if places is not None and (places == places[0]).all():
            self._places = None
            return int(places[0])
        return at  # `run` looks for the farthest back

    # registers

    def get(self, operand: Any, dtype: Any) -> Array:
        """An operand's value for every thread."""
        name = str(operand)
        if name[0] != "%":
            return np.full(self.threads, self._constant(name, dtype))
        special = {
            "%tid.x": self.lanes,
            "%ctaid.x": self.place.program,
            "%nctaid.x": self.place.grid,
            "%ntid.x": self.threads,
            "%laneid": self.lanes % WARP,
        }
        value = self.registers.get(name)
        if name in self.fragments.sums:
            raise KernelError(f"read of {name}, which a wgmma in flight adds to, at {self.where}")
        if value is None:
            if name not in special:
                raise KernelError(f"read of {name} before it was written, at {self.where}")
            return np.broadcast_to(np.asarray(special[name]), self.threads).astype(dtype)
        wanted = np.dtype(dtype)
        if value.dtype == wanted:
            return value
        if value.dtype.itemsize == wanted.itemsize:
            return value.view(wanted)
        return value.astype(BITS[wanted.itemsize]).view(wanted)

    def packed(self, operand: Any, dtype: Any) -> Array:
        """A member of a register that is put together. LLVM packs a value with a register that nobody ever writes where
        the other half is not looked at: that is all ones, a NaN, which would show in a result."""
        if str(operand) in self.registers or str(operand) in self.program.targets:
            return self.get(operand, dtype)
        return np.full(self.threads, np.iinfo(dtype).max, dtype)

    def dtype_of(self, instruction: Instruction) -> Any:
        """The numpy dtype of an instruction's last modifier."""
        if instruction.kind not in TYPES:
            raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")
        return TYPES[instruction.kind]

    def _constant(self, name: str, dtype: Any) -> Any:
        if name == DYNAMIC_SHARED:
            return dtype(0)
        if name in self.program.places:
            return dtype(self.program.places[name])
        return formats.immediate(name, dtype)

    def predicate(self, operand: Any) -> Array:
        """A predicate's value for every thread."""
        name = str(operand)
        if name in ("0", "1", "-1"):
            return np.full(self.threads, name != "0")
        if name[0] == "!":
            return ~self.registers[name[1:]]
        if name not in self.registers:
            raise KernelError(f"read of {name} before it was written, at {self.where}")
        return self.registers[name]

    def put(self, operand: Any, value: Array, active: Array | None) -> None:
        """Write a register of the active threads."""
        name = str(operand)
        if name == "_":
            return
        if name in self.fragments.sums or name in self.fragments.operands:
            raise KernelError(f"write of {name}, which a wgmma in flight uses, at {self.where}")
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

    def addresses(self, operand: Any, dtype: Any, threads: Array) -> Array:
        """Byte addresses of a memory operand, for these threads."""
        return self.get(operand.base, dtype)[threads].astype(np.int64) + operand.offset

    def whole_warps(self, active: Array | None) -> None:
        """Refuse a warp's instruction that some of its lanes do not execute."""
        if active is not None and not (active.reshape(-1, WARP).all(1) == active.reshape(-1, WARP).any(1)).all():
            raise KernelError(f"an instruction of whole warps where some lanes are elsewhere, at {self.where}")

    def all_threads(self, active: Array | None) -> None:
        """Refuse a block's instruction that some threads do not execute."""
        if active is not None and not active.all():
            raise KernelError(f"an instruction of all threads where some are elsewhere, at {self.where}")

    # instructions

    def _arithmetic(self, instruction: Instruction, active: Array | None) -> None:
        parts, (target, *sources) = instruction.parts, instruction.operands
        if parts[-1] == "pred":
            values = [self.predicate(source) for source in sources]
            self.put(target, FUNCTIONS[parts[0]](parts, bool, *values), active)
            return
        if parts[-1] == "f32x2":
            self._packed_arithmetic(instruction, active)
            return
        if parts[-2:] in (("f32", "bf16"), ("f32", "f16")):
            self._mixed_arithmetic(instruction, active)
            return
        dtype = self.dtype_of(instruction)
        kinds = [dtype] * len(sources)
        for i in arithmetic.COUNTS.get(parts[0], ()):
            kinds[i] = np.uint32
        if parts[:2] == arithmetic.WIDE_ADDEND:
            kinds[2] = formats.WIDER[dtype]
        with np.errstate(all="ignore"):
            result = FUNCTIONS[parts[0]](parts, dtype, *map(self.get, sources, kinds))
        self.put(target, result, active)

    def _packed_arithmetic(self, instruction: Instruction, active: Array | None) -> None:
        """Two fp32 in each 64-bit register, as Blackwell computes them: add, sub, mul, fma."""
        target, *sources = instruction.operands
        pairs = [np.ascontiguousarray(self.get(source, np.uint64)).view(np.float32) for source in sources]
        with np.errstate(all="ignore"):
            result = FUNCTIONS[instruction.parts[0]](instruction.parts, np.float32, *pairs)
        self.put(target, np.ascontiguousarray(result).view(np.uint64), active)

    def _mixed_arithmetic(self, instruction: Instruction, active: Array | None) -> None:
        """fp32 from 16-bit operands and a last one in fp32, as Blackwell computes it: add.f32.bf16, fma.f32.f16."""
        target, *sources, last = instruction.operands
        widen = formats.from_bf16 if instruction.kind == "bf16" else formats.from_f16
        values = [*(widen(self.get(source, np.uint16)) for source in sources), self.get(last, np.float32)]
        with np.errstate(all="ignore"):
            result = FUNCTIONS[instruction.parts[0]](instruction.parts, np.float32, *values)
        self.put(target, result, active)
