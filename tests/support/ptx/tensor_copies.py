"""Copies of blocks by descriptor (TMA), and the barriers in shared memory (mbarrier) that they complete.

A copy into shared memory reads when it is issued and writes when its barrier is waited for the second time, as a first
`try_wait` may fail: the latest that it may. Until then nobody may touch its bytes. They are ordered for the threads that waited, and for wgmma. A copy out
of shared memory needs a barrier and `fence.proxy.async` after the writes, and until its wait nobody may write there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .faults import KernelError
from .formats import BITS, Array
from .program import Address, Block, Instruction
from .shared_memory import MANY
from .tensor_cores import SWIZZLES

if TYPE_CHECKING:
    from .thread_block import ThreadBlock

IN = [("tensor", "2d", f"shared::{scope}", "global") for scope in ("cta", "cluster")]  # without a cluster the same


@dataclass(frozen=True)
class TensorMap:
    """What a descriptor's 128 bytes say: a matrix in global memory, and the box of a copy."""

    start: int
    shape: tuple[int, int]
    stride: int  # elements from row to row
    box: tuple[int, int]
    size: int  # bytes of an element
    width: int  # bytes that are swizzled, 0 for none

    def elements(self, row: int, column: int) -> tuple[Array, Array]:
        """Global byte addresses of the box at a place, row by row, and which of them are in the matrix."""
        rows, columns = row + np.arange(self.box[0])[:, None], column + np.arange(self.box[1])[None, :]
        inside = (rows >= 0) & (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        return self.start + (rows * self.stride + columns) * self.size, inside

    def places(self, base: int, where: str) -> Array:
        """Shared byte addresses of the box's elements, row by row."""
        line = self.box[1] * self.size
        if self.width and line > self.width:
            raise KernelError(f"a box of {line} bytes per row with a swizzle of {self.width}, at {where}")
        if base % max(128, 8 * self.width):
            raise KernelError(f"a box at {base}, which its swizzle does not divide, at {where}")
        linear = base + np.arange(self.box[0])[:, None] * line + np.arange(self.box[1])[None, :] * self.size
        return linear ^ (((linear >> 7) & SWIZZLES.get(self.width, 0)) << 4)


@dataclass(frozen=True)
class Landing:
    """A copy under way into shared memory: where its elements go, and what they are."""

    places: Array
    values: Array


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    count: int
    warp: int  # that initialized it
    born: int  # the block's clock then
    pending: int = 0
    expected: int = 0
    phase: int = 0
    tried: bool = False  # a wait for this phase has failed
    copies: list[Landing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, expected: int) -> None:
        """One arrival, and bytes that copies will bring."""
        self.pending, self.expected = self.pending - 1, self.expected + expected
        self._complete()

    def land(self) -> list[Landing]:
        """All copies under way arrive."""
        landed, self.copies = self.copies, []
        self.expected -= sum(copy.values.nbytes for copy in landed)
        self._complete()
        return landed

    def _complete(self) -> None:
        if not self.pending and not self.expected and not self.copies:
            self.phase, self.pending, self.tried = self.phase + 1, self.count, False


def elect(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """elect.sync: lane 0 of each warp."""
    block.whole_warps(active)
    leader, predicate = str(instruction.operands[0]).split("|")
    block.put(leader, np.zeros(block.threads, np.uint32), active)
    block.put(predicate, block.lanes % 32 == 0, active)


def barrier(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """mbarrier.init, inval, arrive.expect_tx and try_wait.parity."""
    kind = instruction.parts[1]
    target, operands = None, list(instruction.operands)
    if kind in ("arrive", "try_wait"):
        target = operands.pop(0)
    threads = block.chosen(active)
    for thread, address in zip(threads, block.addresses(operands[0], np.uint32, threads).tolist(), strict=True):
        warp = int(block.warps[thread])
        if kind == "init":
            count = int(block.get(operands[1], np.uint32)[thread])
            block.shared.start_barrier(address, Barrier(count, warp, block.shared.clock), block.where)
        elif kind == "inval":
            block.shared.barrier_at(address, warp, block.where)
            del block.shared.barriers[address]
        elif kind == "arrive" and instruction.parts[2] == "expect_tx":
            found = block.shared.barrier_at(address, warp, block.where)
            if not found.pending:
                raise KernelError(f"more arrivals than the mbarrier counts, at {block.where}")
            found.arrive(int(block.get(operands[1], np.uint32)[thread]))
        elif kind != "try_wait" or instruction.parts[2] != "parity":
            raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")
    if kind == "try_wait":
        block.put(target, _waited(block, operands, active), active)


def _waited(block: ThreadBlock, operands: list[object], active: Array | None) -> Array:
    """Which threads' phases are complete; copies land for all threads at once."""
    block.all_threads(active)
    places = np.unique(block.addresses(operands[0], np.uint32, block.lanes))
    parity = np.unique(block.get(operands[1], np.uint32))
    if len(places) != 1 or len(parity) != 1:
        raise KernelError(f"threads that wait for different phases are not known, at {block.where}")
    found = block.shared.barrier_at(int(places[0]), MANY, block.where)
    if found.phase % 2 == parity[0] and not found.tried:
        found.tried = True
        return np.zeros(block.threads, bool)
    if found.phase % 2 == parity[0]:
        block.shared.land(found)
    if found.phase % 2 == parity[0]:
        raise KernelError(
            f"a wait that nothing ends: {found.pending} arrivals and {found.expected} bytes are missing, at {block.where}"
        )
    return np.ones(block.threads, bool)


def copy(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """cp.async.bulk: tensor copies of two dimensions in and out, and the groups of those out."""
    parts, operands = instruction.parts, instruction.operands
    if parts[3] == "commit_group":
        block.shared.stores.commit()
    elif parts[3] == "wait_group":
        block.shared.wait_for_stores(int(str(operands[0]), 0))
    elif parts[3:7] in IN and parts[7:] == ("mbarrier::complete_tx::bytes",):
        for thread in block.chosen(active):
            _copy_in(block, operands, thread)
    elif parts[3:] == ("tensor", "2d", "global", "shared::cta", "bulk_group"):
        for thread in block.chosen(active):
            _copy_out(block, operands, thread)
    else:
        raise KernelError(f"the interpreter does not know {instruction.opcode}: {instruction.text}")


def _copy_in(block: ThreadBlock, operands: tuple[object, ...], thread: int) -> None:
    target, source, signal = operands
    described, row, column = _box(block, source, thread)
    places = described.places(_address(block, target, thread), block.where)
    addresses, inside = described.elements(row, column)
    warp, dtype = block.warps[thread : thread + 1], BITS[described.size]
    values = np.zeros(described.box, dtype)
    if inside.any():
        given = block.memory.read(
            addresses[inside], described.size, warp, block.place.program, block.shared.clock, block.where
        )
        values[inside] = given.view(dtype)[:, 0]
    found = block.shared.barrier_at(_address(block, signal, thread), int(warp[0]), block.where)
    block.shared.start_landing(found, Landing(places, values), warp, block.where)


def _copy_out(block: ThreadBlock, operands: tuple[object, ...], thread: int) -> None:
    target, source = operands
    described, row, column = _box(block, target, thread)
    places = described.places(_address(block, source, thread), block.where)
    values = block.shared.start_store(places, described.size, block.where)
    addresses, inside = described.elements(row, column)
    if inside.any():
        clock, warp = block.shared.clock, block.warps[thread : thread + 1]
        words = values[inside][:, None]
        block.memory.write(addresses[inside], words, described.size, warp, block.place.program, clock, block.where)


def _address(block: ThreadBlock, operand: object, thread: int) -> int:
    if not isinstance(operand, Address):
        raise KernelError(f"a copy without an address at {block.where}")
    return int(block.addresses(operand, np.uint32, np.array([thread]))[0])


def _box(block: ThreadBlock, operand: object, thread: int) -> tuple[TensorMap, int, int]:
    """A copy's descriptor, and the row and column of its box."""
    if not isinstance(operand, Block):
        raise KernelError(f"a copy without coordinates at {block.where}")
    place = int(block.get(operand.base, np.uint64)[thread])
    described = block.values.get(block.program.names.get(place, ""))
    if not isinstance(described, TensorMap):
        raise KernelError(f"a copy by something that is no descriptor, at {block.where}")
    column, row = (int(block.get(name, np.int32)[thread]) for name in operand.coordinates)
    return described, row, column
