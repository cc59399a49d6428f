"""The work of a launch: issue slots, tensor operations, shared-memory wavefronts, global sectors.

Each instruction is counted as it is executed, from the addresses that its threads compute. Programs that share a row
block or a tile do the same work as those of any other, up to the edges: a few are executed for all, with the launch's
own arguments, over memory that has addresses but no bytes, so that a launch of any size can be counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch

from .formats import Array, pieces
from .global_memory import ALIGNMENT, GlobalMemory
from .instructions import WARP
from .launch import Compiled, flattened, parameter_values, parsed
from .program import Instruction
from .shared_memory import SharedMemory
from .thread_block import ThreadBlock

BANKS, BANK_BYTES = 32, 4
SECTOR = 32  # bytes of global memory that move at once
PHASE_BYTES = BANKS * BANK_BYTES  # the most that a warp's access to shared memory moves in one pass
FREE = ("mov", "cvta")  # ptxas renames registers instead
WIDE_INTEGERS = {"add": 2, "sub": 2, "mul": 4, "mad": 4, "shl": 2, "shr": 2, "setp": 2, "selp": 2, "and": 2, "or": 2}


@dataclass
class Work:
    """Work of one or more programs; add with `+`, repeat with `*`."""

    issue_slots: float = 0
    tensor_flops: float = 0
    tf32_flops: float = 0
    shared_wavefronts: float = 0
    global_sectors: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))

    def issue(self, instruction: Instruction, here: Array | None, threads: int) -> None:
        """Count an instruction for each warp with a thread at it; a false guard takes the slot all the same."""
        warps = threads // WARP if here is None else int(here.reshape(-1, WARP).any(1).sum())
        self.issue_slots += warps * slots(instruction)
        head = instruction.parts[0]
        if head == "mma":
            self._multiply(matrix_flops(instruction.parts[3]) * warps, instruction.parts[7])
        elif head == "wgmma" and instruction.parts[1] == "mma_async":
            # 64 rows of A per warpgroup of 4 warps; both operands pass through shared memory's data path
            shape, kind = instruction.parts[4], instruction.parts[6]
            self._multiply(matrix_flops(shape) * warps / 4, kind)
            columns, depth = (int(number) for number in re.findall(r"n(\d+)k(\d+)", shape)[0])
            rows = columns if isinstance(instruction.operands[1], tuple) else columns + 64
            self.shared_wavefronts += warps / 4 * rows * depth * (4 if kind == "tf32" else 2) / PHASE_BYTES

    def _multiply(self, flops: float, kind: str) -> None:
        if kind == "tf32":
            self.tf32_flops += flops
        else:
            self.tensor_flops += flops


def slots(instruction: Instruction) -> int:
    """Issue slots of an instruction: none if ptxas removes it, more for 64-bit integers."""
    parts = instruction.parts
    if parts[0] in FREE or parts[:2] == ("ld", "param"):
        return 0
    if parts[-1] in ("s64", "u64", "b64") and parts[0] in WIDE_INTEGERS:
        return 1 if "wide" in parts else WIDE_INTEGERS[parts[0]]
    return 1


def matrix_flops(shape: str) -> int:
    """FLOPs of one matrix product such as `m16n8k16`."""
    m, n, k = (int(number) for number in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())  # type: ignore[union-attr]
    return 2 * m * n * k


def wavefronts(addresses: Array, size: int, warps: Array) -> int:
    """Count the passes through shared memory's 32 banks."""
    lanes = PHASE_BYTES // max(size, BANK_BYTES)
    place = np.arange(len(addresses)) - np.searchsorted(warps, warps)  # index within the warp; warps are in order
    phases = (warps.astype(np.int64) * WARP + place // lanes) << 32
    wanted = np.unique(phases[:, None] | pieces(addresses, size, BANK_BYTES))  # each word of a phase once
    phase, bank = np.unique(wanted >> 32, return_inverse=True)[1], wanted % BANKS
    conflicts = np.bincount(phase * BANKS + bank, minlength=(int(phase.max()) + 1) * BANKS)
    return int(conflicts.reshape(-1, BANKS).max(1).sum())


def sectors(addresses: Array, size: int, warps: Array) -> int:
    """Count the 32-byte sectors that the lanes of each warp touch; lanes of one warp share them."""
    keys = warps.astype(np.int64)[:, None] << 48 | pieces(addresses, size, SECTOR)
    return len(np.unique(keys))


class MeteredShared(SharedMemory):
    """Shared memory that counts the wavefronts of lanes; copies by descriptor are not counted."""

    def __init__(self, size: int, work: Work) -> None:
        super().__init__(size)
        self.work = work

    def _check(self, addresses: Array, size: int, warps: Array, doing: str) -> Array:
        if doing != "copy":
            self.work.shared_wavefronts += wavefronts(addresses, size, warps)
        return super()._check(addresses, size, warps, doing)


class AddressSpace(GlobalMemory):
    """Global memory without bytes: reads give zeros, writes are forgotten, counters count."""

    def __init__(self, work: Work) -> None:
        super().__init__(0)
        self.work = work
        self.sums: Counter[int] = Counter()

    def read(self, addresses: Array, size: int, warps: Array, dtype: Any) -> Array:
        self.work.global_sectors += sectors(addresses, size, warps)
        return np.zeros((len(addresses), size // np.dtype(dtype).itemsize), dtype)

    def write(self, addresses: Array, values: Array, size: int, warps: Array) -> None:
        self.work.global_sectors += sectors(addresses, size, warps)

    def atomic_add(self, addresses: Array, values: Array, ordered: bool = True) -> Array:
        former = np.zeros(len(addresses), np.uint32)
        for i, address in enumerate(addresses.tolist()):
            former[i] = self.sums[address]
            self.sums[address] += int(values[i])
        return former


class MeteredBlock(ThreadBlock):
    """A thread block that counts."""

    work: Work

    def _issued(self, instruction: Instruction, here: Array | None) -> None:
        self.work.issue(instruction, here, self.threads)


def work_of(launch: Any, compiled: Compiled, programs: Sequence[int]) -> Work:
    """The work of these programs of a launch, executed in this order. Its tensors may be on `meta`."""
    program, work = parsed(compiled.ptx), Work()
    arguments = flattened(launch, compiled.signature)
    memory, values = (
        AddressSpace(work),
        parameter_values(program, arguments, compiled.descriptors, _distant_addresses()),
    )
    for i in programs:
        block = MeteredBlock(program, memory, compiled.shared, values, i, launch.grid)
        block.work, block.shared = work, MeteredShared(compiled.shared, work)
        block.run()
    return work


def _distant_addresses() -> Callable[[torch.Tensor], int]:
    """Return a function that assigns tensors addresses that are far apart."""
    starts = count(ALIGNMENT, 1 << 40)
    return cache(lambda tensor: next(starts))
