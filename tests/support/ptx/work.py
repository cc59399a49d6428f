"""What a program asks of a multiprocessor: issue slots, tensor operations, shared-memory wavefronts, global sectors.

Counted of each instruction as it is executed, from the addresses that its threads really compute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import numpy as np

from .formats import Array, pieces
from .instructions import WARP
from .program import Instruction

BANKS, BANK_BYTES = 32, 4
SECTOR = 32  # bytes of global memory that move at once
PHASE_BYTES = BANKS * BANK_BYTES  # a warp's access to shared memory moves so many at most in one pass
FREE = ("mov", "cvta")  # ptxas renames registers instead
WIDE_INTEGERS = {"add": 2, "sub": 2, "mul": 4, "mad": 4, "shl": 2, "shr": 2, "setp": 2, "selp": 2, "and": 2, "or": 2}


@dataclass
class Work:
    """Of one or more programs; add them with `+`, repeat them with `*`."""

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
        """An instruction, by the warps that have a thread at it; a guard that is false takes the slot all the same."""
        warps = threads // WARP if here is None else int(here.reshape(-1, WARP).any(1).sum())
        self.issue_slots += warps * slots(instruction)
        head = instruction.parts[0]
        if head == "mma":
            self._multiply(matrix_flops(instruction.parts[3]) * warps, instruction.parts[7])
        elif head == "wgmma" and instruction.parts[1] == "mma_async":
            # 64 rows of A a warpgroup of 4 warps; both operands pass through shared memory's data path
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
    """Issue slots of an instruction: none for what ptxas does by naming, more for integers of 64 bits."""
    parts = instruction.parts
    if parts[0] in FREE or parts[:2] == ("ld", "param"):
        return 0
    if parts[-1] in ("s64", "u64", "b64") and parts[0] in WIDE_INTEGERS:
        return 1 if "wide" in parts else WIDE_INTEGERS[parts[0]]
    return 1


def matrix_flops(shape: str) -> int:
    """Of one `m16n8k16`."""
    m, n, k = (int(number) for number in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())  # type: ignore[union-attr]
    return 2 * m * n * k


def wavefronts(addresses: Array, size: int, warps: Array) -> int:
    """Passes through shared memory's 32 banks."""
    lanes = PHASE_BYTES // max(size, BANK_BYTES)
    place = np.arange(len(addresses)) - np.searchsorted(warps, warps)  # among the warp's own; warps are in order
    phases = (warps.astype(np.int64) * WARP + place // lanes) << 32
    wanted = np.unique(phases[:, None] | pieces(addresses, size, BANK_BYTES))  # each word of a phase once
    phase, bank = np.unique(wanted >> 32, return_inverse=True)[1], wanted % BANKS
    conflicts = np.bincount(phase * BANKS + bank, minlength=(int(phase.max()) + 1) * BANKS)
    return int(conflicts.reshape(-1, BANKS).max(1).sum())


def sectors(addresses: Array, size: int, warps: Array) -> int:
    """Pieces of 32 bytes that the lanes of each warp touch; lanes of one warp share them."""
    keys = warps.astype(np.int64)[:, None] << 48 | pieces(addresses, size, SECTOR)
    return len(np.unique(keys))
