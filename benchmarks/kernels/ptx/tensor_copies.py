"""Copies of blocks by descriptor (TMA), and the barriers in shared memory (mbarrier) that they complete.

A copy into shared memory reads when it is issued and writes as late as it may: at the second wait for its barrier, as
the first `try_wait` may fail. Until then, nothing may touch its bytes; then they are ordered for the threads that
waited, and for wgmma. A copy out of shared memory needs a barrier and `fence.proxy.async` after the writes, and until
its wait nothing may write there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .formats import BITS, Array
from .program import Block, Instruction, KernelError, Operand
from .shared_memory import MANY, Copy
from .tensor_cores import SWIZZLES

if TYPE_CHECKING:
    from .thread_block import ThreadBlock

IN = [("tensor", "2d", f"shared::{scope}", "global") for scope in ("cta", "cluster")]  # equivalent without a cluster


@dataclass(frozen=True)
class TensorMap:
    """The content of a descriptor's 128 bytes: a matrix in global memory, and the box of a copy."""

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

    def places(self, base: int) -> Array:
        """Shared byte addresses of the box's elements, row by row."""
        line = self.box[1] * self.size
        if self.width and line > self.width:
            raise KernelError(f"a box of {line} bytes per row with a swizzle of {self.width}")
        if base % max(128, 8 * self.width):
            raise KernelError(f"a box at {base}, which its swizzle does not divide")
        linear = base + np.arange(self.box[0])[:, None] * line + np.arange(self.box[1])[None, :] * self.size
        return linear ^ (((linear >> 7) & SWIZZLES.get(self.width, 0)) << 4)


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
    copies: list[Copy] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, expected: int) -> None:
        """Count one arrival, and the bytes that copies will bring."""
        self.pending, self.expected = self.pending - 1, self.expected + expected
        self._complete()

    def land(self) -> list[Copy]:
        """Complete all copies in flight, and return them."""
        landed, self.copies = self.copies, []
        self.expected -= sum(copy.words.nbytes for copy in landed)
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
    operands, (kind, *rest) = instruction.operands, instruction.parts[1:]
    if (kind, rest[0]) == ("try_wait", "parity"):
        block.put(operands[0], _waited(block, operands[1:], active), active)
        return
    if kind in ("arrive", "try_wait"):
        operands = operands[1:]
    threads, shared = block.chosen(active), block.shared
    for thread, address in zip(threads, block.addresses(operands[0], np.uint32, threads).tolist(), strict=True):
        warp = int(block.warps[thread])
        if kind == "init":
            count = int(block.get(operands[1], np.uint32)[thread])
            shared.start_barrier(address, Barrier(count, warp, shared.clock))
        elif kind == "inval":
            shared.barrier_at(address, warp)
            del shared.barriers[address]
        elif (kind, rest[0]) == ("arrive", "expect_tx"):
            found = shared.barrier_at(address, warp)
            if not found.pending:
                raise KernelError("more arrivals than the mbarrier counts")
            found.arrive(int(block.get(operands[1], np.uint32)[thread]))
        else:
            raise instruction.unknown()


def _waited(block: ThreadBlock, operands: tuple[Operand, ...], active: Array | None) -> Array:
    """Return which threads' phases are complete; copies land for all threads at once."""
    block.all_threads(active)
    places = np.unique(block.addresses(operands[0], np.uint32, block.lanes))
    parity = np.unique(block.get(operands[1], np.uint32))
    if len(places) != 1 or len(parity) != 1:
        raise KernelError("waits of threads for different phases are not supported")
    found = block.shared.barrier_at(int(places[0]), MANY)
    if found.phase % 2 == parity[0] and not found.tried:
        found.tried = True
        return np.zeros(block.threads, bool)
    if found.phase % 2 == parity[0]:
        block.shared.arrive(found.land())
    if found.phase % 2 == parity[0]:
        missing = f"{found.pending} arrivals and {found.expected} bytes are missing"
        raise KernelError(f"a wait that nothing ends: {missing}")
    return np.ones(block.threads, bool)


def copy(block: ThreadBlock, instruction: Instruction, active: Array | None) -> None:
    """cp.async.bulk: tensor copies of two dimensions in and out, and the groups of those out."""
    parts, operands = instruction.parts, instruction.operands
    if parts[3] == "commit_group":
        block.shared.stores.commit()
    elif parts[3] == "wait_group":
        block.shared.wait_for_readers(block.shared.stores, instruction.number())
    elif parts[3:7] in IN and parts[7:] == ("mbarrier::complete_tx::bytes",):
        for thread in block.chosen(active):
            _copy_in(block, operands, thread)
    elif parts[3:] == ("tensor", "2d", "global", "shared::cta", "bulk_group"):
        for thread in block.chosen(active):
            _copy_out(block, operands, thread)
    else:
        raise instruction.unknown()


def _copy_in(block: ThreadBlock, operands: tuple[Operand, ...], thread: int) -> None:
    target, source, signal = operands
    described, row, column = _box(block, source, thread)
    places = described.places(_address(block, target, thread))
    addresses, inside = described.elements(row, column)
    warp, dtype = block.warps[thread : thread + 1], BITS[described.size]
    values = np.zeros(described.box, dtype)
    if inside.any():
        values[inside] = block.memory.read(addresses[inside], described.size, warp, dtype)[:, 0]
    found = block.shared.barrier_at(_address(block, signal, thread), int(warp[0]))
    block.shared.start_landing(found, places, values, warp)


def _copy_out(block: ThreadBlock, operands: tuple[Operand, ...], thread: int) -> None:
    target, source = operands
    described, row, column = _box(block, target, thread)
    values = block.shared.start_store(described.places(_address(block, source, thread)), described.size)
    addresses, inside = described.elements(row, column)
    if inside.any():
        warp = block.warps[thread : thread + 1]
        block.memory.write(addresses[inside], values[inside][:, None], described.size, warp)


def _address(block: ThreadBlock, operand: Operand, thread: int) -> int:
    return int(block.addresses(operand, np.uint32, np.array([thread]))[0])


def _box(block: ThreadBlock, operand: Operand, thread: int) -> tuple[TensorMap, int, int]:
    """A copy's descriptor, and the row and column of its box."""
    if not isinstance(operand, Block):
        raise KernelError("a copy without coordinates")
    place = int(block.get(operand.base, np.uint64)[thread])
    described = block.values.get(place)
    if not isinstance(described, TensorMap):
        raise KernelError("a copy by something that is no descriptor")
    column, row = (int(block.get(name, np.int32)[thread]) for name in operand.coordinates)
    return described, row, column
