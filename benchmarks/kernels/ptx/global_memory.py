"""Device memory: allocations with red zones in one arena, and the checks of every access.

An access must be within one allocation and aligned to its size. Accesses of different programs to the same bytes must
be ordered by an `acq_rel` atomic that both execute: each program has a clock that ticks at its barriers; an atomic
publishes the clocks that its program knows, and learns those that earlier ones published. Reads of unwritten bytes are
not detected: tests fill new tensors with NaN, which shows in the result.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import Array, pieces
from .program import KernelError

if TYPE_CHECKING:
    from .thread_block import ThreadBlock

RED_ZONE = 4096  # bytes between allocations
ALIGNMENT = 256
GRANULE = 2  # bytes that share a record of their writer: the size of the smallest store
NOBODY = -1


@dataclass
class Allocation:
    """One tensor's storage."""

    start: int
    end: int
    written: bool = False


class GlobalMemory:
    """The arena of one launch, whose programs run one after another."""

    def __init__(self, size: int) -> None:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        self.bytes = np.zeros(size, np.uint8)
        self.writer = np.full(size // GRANULE, NOBODY, np.int32)
        self.write_clock = np.zeros(size // GRANULE, np.int32)
        self.write_warp = np.zeros(size // GRANULE, np.int32)
        self.allocations: list[Allocation] = []
        self.counters: set[int] = set()  # addresses of atomics
        self.pending: set[int] = set()  # starts of allocations that the previous launch may still write
        self.waited: set[int] = set()  # programs that have waited for it
        self._published: dict[int, dict[int, int]] = {}  # clocks of programs, by the atomic's address
        self._learned: dict[int, tuple[int, int]] = {}  # by program: its clock, the running one's on learning it
        self._top = RED_ZONE

    def allocate(self, content: Array, offset: int = 0) -> int:
        """Put bytes into the arena, `offset` after an aligned address; return their address."""
        start = -(-self._top // ALIGNMENT) * ALIGNMENT + offset
        end = start + len(content)
        self.bytes[start:end] = content
        self.allocations.append(Allocation(start, end))
        self._top = end + RED_ZONE
        return start

    def content(self, start: int, size: int) -> Array:
        """The current bytes."""
        return self.bytes[start : start + size]

    def begin(self, block: ThreadBlock) -> None:
        """Switch to another program, which knows nothing of the others yet."""
        self._block, self._program, self._learned = block, block.number, {}

    @property
    def _clock(self) -> int:
        return self._block.shared.clock

    def read(self, addresses: Array, size: int, warps: Array, dtype: Any) -> Array:
        """`size` bytes at each address as values [n, k] of a dtype."""
        touched = self._find(addresses, size, "read")
        self._check_pending(touched, "read")
        if any(allocation.written for allocation in touched):
            self._check_order(addresses, size, warps, "read")
        return self.bytes.view(dtype)[pieces(addresses, size, np.dtype(dtype).itemsize)]

    def write(self, addresses: Array, values: Array, size: int, warps: Array) -> None:
        """Store values [n, k]."""
        touched = self._find(addresses, size, "write")
        self._check_pending(touched, "write")
        if len(np.unique(addresses)) != len(addresses):
            raise KernelError("two threads store to one address")
        self._check_order(addresses, size, warps, "write")
        granules = pieces(addresses, size, GRANULE)
        self.writer[granules], self.write_clock[granules] = self._program, self._clock
        self.write_warp[granules] = warps[:, None]
        for allocation in touched:
            allocation.written = True
        self.bytes.view(values.dtype)[pieces(addresses, size, values.itemsize)] = values

    def atomic_add(self, addresses: Array, values: Array, ordered: bool = True) -> Array:
        """`atom.global.gpu.add.u32`, thread by thread; returns the former values. `ordered`: acq_rel, else relaxed."""
        self._find(addresses, 4, "atomic")
        words, former = self.bytes.view(np.uint32), np.zeros(len(addresses), np.uint32)
        for i, address in enumerate(addresses.tolist()):
            former[i] = words[address // 4]
            words[address // 4] += values[i]
            self.counters.add(address)
            if ordered:
                self._pass_through(address)
            self.writer[address // GRANULE : (address + 4) // GRANULE] = NOBODY  # atomics are ordered by themselves
        return former

    def _pass_through(self, address: int) -> None:
        """An acq_rel atomic of the running program: learn what was published there, publish what is known."""
        known = self._published.setdefault(address, {})
        for other, released in known.items():
            if other != self._program:
                self._learned[other] = released, self._clock
        known[self._program] = self._clock  # stores before the last barrier are released
        for other, (released, _) in self._learned.items():
            known.setdefault(other, released)

    def _check_pending(self, touched: list[Allocation], doing: str) -> None:
        if self._program not in self.waited and any(allocation.start in self.pending for allocation in touched):
            raise KernelError(f"{doing} of what the launch before may still write, without griddepcontrol.wait")

    def _find(self, addresses: Array, size: int, doing: str) -> list[Allocation]:
        """Check alignment and bounds; return the allocations that are touched."""
        if (addresses % size).any():
            raise KernelError(f"misaligned global {doing} of {size} bytes")
        touched: dict[int, Allocation] = {}
        for low, high in _ranges(addresses, size):
            place = bisect_right(self.allocations, low, key=lambda one: one.start) - 1
            allocation = self.allocations[place] if place >= 0 else None
            if allocation is None or high > allocation.end:
                past = "" if allocation is None else f", {high - allocation.end} bytes past the end of a tensor"
                raise KernelError(f"global {doing} out of bounds{past}")
            touched[place] = allocation
        return list(touched.values())

    def _check_order(self, addresses: Array, size: int, warps: Array, doing: str) -> None:
        granules, program, clock = pieces(addresses, size, GRANULE), self._program, self._clock
        writers, clocks = self.writer[granules], self.write_clock[granules]
        for other in np.unique(writers):
            if other in (NOBODY, program):
                continue
            if other not in self._learned:
                raise KernelError(f"global race: {doing} of what program {other} wrote, not ordered by an atomic")
            released, learned_at = self._learned[int(other)]
            if (clocks[writers == other] >= released).any():
                raise KernelError(
                    f"global race: program {other}'s store comes after its last barrier before the atomic"
                )
            if clock <= learned_at and (warps != 0).any():
                raise KernelError(f"global race: no barrier between the atomic and this {doing}")
        own = (writers == program) & (clocks == clock) & (self.write_warp[granules] != warps[:, None])
        if own.any():
            raise KernelError(f"global race between warps of one program: {doing} without a barrier")


def _ranges(addresses: Array, size: int) -> list[tuple[int, int]]:
    """Merge the addresses into ranges without gaps: few if threads access neighboring bytes."""
    ordered = np.unique(addresses)
    breaks = np.nonzero(np.diff(ordered) > size)[0]
    starts = np.concatenate(([0], breaks + 1))
    ends = np.concatenate((breaks, [len(ordered) - 1]))
    return [(int(ordered[low]), int(ordered[high]) + size) for low, high in zip(starts, ends, strict=True)]
