"""Shared memory of one block, and the checks of every access.

Only barriers order the warps of a block: two accesses of different warps between the same two barriers are a race if
one of them writes. A cp.async writes when it is waited for: until then nothing may touch its bytes, and other warps
need a barrier after the wait. wgmma reads through the asynchronous proxy: writes before it need a barrier and
`fence.proxy.async`, and until its wait nothing may write what it reads. The same holds for copies by descriptor, see
`tensor_copies`.

Inside a warp, lanes are in lockstep here: a missing `bar.warp.sync` is not detected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .formats import BITS, Array, pieces
from .program import KernelError

if TYPE_CHECKING:
    from .tensor_copies import Barrier

GRANULE = 2  # bytes that share a record of their accesses
UNDEFINED = 0xFF  # content of unwritten bytes
MANY = -2  # several warps read
NEVER = -1


class Copy(NamedTuple):
    """An asynchronous copy: the granules that lanes write [lanes, granules], words and their places, and the warps that
    issued it (None: a copy by descriptor, ordered for all threads)."""

    granules: Array
    places: Array
    words: Array
    warps: Array | None = None


@dataclass
class Pipeline:
    """Groups of asynchronous operations: committed in order, waited for in order."""

    open: list[Any] = field(default_factory=list)
    groups: list[list[Any]] = field(default_factory=list)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> list[Any]:
        """Finish groups until at most `pending` are left; return their operations."""
        count = max(0, len(self.groups) - pending)
        finished = [operation for group in self.groups[:count] for operation in group]
        self.groups = self.groups[count:]
        return finished

    @property
    def unfinished(self) -> list[Any]:
        return [operation for group in (*self.groups, self.open) for operation in group]


class SharedMemory:
    """The bytes of one block."""

    def __init__(self, size: int) -> None:
        size = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(size, UNDEFINED, np.uint8)
        count = size // GRANULE
        self.initialized = np.zeros(count, bool)
        self.write_warp, self.write_clock = np.full(count, NEVER, np.int32), np.full(count, NEVER, np.int32)
        self.read_warp, self.read_clock = np.full(count, NEVER, np.int32), np.full(count, NEVER, np.int32)
        self.in_flight = np.zeros(count, np.int32)  # copies that will write
        self.in_use = np.zeros(count, np.int32)  # wgmma and outgoing copies that still read
        self.write_fence = np.full(count, NEVER, np.int32)
        self.copies, self.products, self.stores = Pipeline(), Pipeline(), Pipeline()
        self.barriers: dict[int, Barrier] = {}
        self.clock = self.fences = 0

    def read(self, addresses: Array, size: int, warps: Array, dtype: Any) -> Array:
        """`size` bytes at each address as values [n, k] of a dtype."""
        granules = self._check(addresses, size, warps, "read")
        if not self.initialized[granules].all():
            raise KernelError("read of shared memory that nobody wrote")
        others = (self.read_clock[granules] == self.clock) & (self.read_warp[granules] != warps[:, None])
        self.read_warp[granules] = np.where(others, MANY, warps[:, None])
        self.read_clock[granules] = self.clock
        return self.bytes.view(dtype)[pieces(addresses, size, np.dtype(dtype).itemsize)]

    def write(self, addresses: Array, values: Array, size: int, warps: Array) -> None:
        """Store values [n, k]."""
        granules = self._check_write(addresses, size, warps)
        self._written(granules, warps)
        self.bytes.view(values.dtype)[pieces(addresses, size, values.itemsize)] = values

    def start_copy(self, addresses: Array, words: Array, size: int, warps: Array) -> None:
        """Start a cp.async of words [n, k]."""
        granules = self._check_write(addresses, size, warps)
        if len(np.unique(granules)) != granules.size:
            raise KernelError("two cp.async to one place")
        self.in_flight[granules] += 1
        self.copies.open.append(Copy(granules, pieces(addresses, size, words.itemsize), words, warps))

    def arrive(self, copies: list[Copy]) -> None:
        """Write the copies that were waited for."""
        for copy in copies:
            self.bytes.view(copy.words.dtype)[copy.places] = copy.words
            self.in_flight[copy.granules] -= 1
            self._written(copy.granules, copy.warps)

    def use(self, addresses: Array, size: int) -> None:
        """Begin a wgmma that reads the bytes at these addresses."""
        self.products.open.append(self._used("wgmma", addresses, size))

    def start_store(self, addresses: Array, size: int) -> Array:
        """Begin an outgoing copy that reads elements at these addresses; return their values."""
        self.stores.open.append(self._used("a copy", addresses, size))
        values: Array = self.bytes.view(BITS[size])[addresses // size]
        return values

    def _used(self, reader: str, addresses: Array, size: int) -> Array:
        """Check and mark granules that an asynchronous operation begins to read."""
        if (addresses < 0).any() or (addresses + size > len(self.bytes)).any():
            raise KernelError(f"{reader} descriptor out of shared memory")
        granules = np.unique(pieces(addresses.reshape(-1), size, GRANULE))
        if (self.in_flight[granules] > 0).any():
            raise KernelError(f"{reader} reads bytes that a cp.async is still writing")
        if not self.initialized[granules].all():
            raise KernelError(f"{reader} reads shared memory that nobody wrote")
        if (self.write_clock[granules] == self.clock).any():
            raise KernelError(f"{reader} reads shared memory without a barrier after the write")
        if (self.write_fence[granules] >= self.fences).any():
            raise KernelError(f"{reader} reads shared memory without fence.proxy.async after the write")
        self.in_use[granules] += 1
        self._read_by_all(granules)
        return granules

    def wait_for_readers(self, pipeline: Pipeline, pending: int) -> None:
        """A wait_group of wgmma or outgoing copies: those that finished have read their bytes."""
        for granules in pipeline.wait(pending):
            self.in_use[granules] -= 1
            self._read_by_all(granules)

    def start_barrier(self, address: int, barrier: Barrier) -> None:
        """mbarrier.init."""
        if address % 8 or not 0 <= address <= len(self.bytes) - 8:
            raise KernelError(f"an mbarrier at {address} of {len(self.bytes)} bytes")
        if address in self.barriers:
            raise KernelError("an mbarrier is initialized twice")
        self.barriers[address] = barrier

    def barrier_at(self, address: int, warp: int) -> Barrier:
        """The mbarrier at an address, for a thread of a warp."""
        found = self.barriers.get(address)
        if found is None:
            raise KernelError(f"there is no mbarrier at {address}")
        if found.born == self.clock and found.warp != warp:
            raise KernelError("use of an mbarrier without a barrier after its initialization")
        return found

    def start_landing(self, barrier: Barrier, places: Array, values: Array, warp: Array) -> None:
        """Begin a copy by descriptor, which will write and complete bytes of an mbarrier."""
        granules = self._check_write(places.reshape(-1), values.itemsize, np.broadcast_to(warp, places.size), "copy")
        if (self.write_fence[granules] >= self.fences).any():
            raise KernelError("a copy overwrites what was written without fence.proxy.async")
        self.in_flight[granules] += 1
        barrier.copies.append(Copy(granules, places // values.itemsize, values))

    def finish(self) -> None:
        if self.copies.unfinished:
            raise KernelError("a cp.async is still in flight at the end of the kernel")
        if self.products.unfinished:
            raise KernelError("a wgmma is still in flight at the end of the kernel")
        if self.stores.unfinished or any(barrier.copies for barrier in self.barriers.values()):
            raise KernelError("a copy by descriptor is still in flight at the end of the kernel")

    def _read_by_all(self, granules: Array) -> None:
        self.read_warp[granules], self.read_clock[granules] = MANY, self.clock

    def _written(self, granules: Array, warps: Array | None) -> None:
        """Record a write by these warps now, or (None) one that is ordered for all."""
        self.initialized[granules] = True
        self.write_warp[granules] = MANY if warps is None else warps[:, None]
        clock, fence = (NEVER, NEVER) if warps is None else (self.clock, self.fences)
        self.write_clock[granules], self.write_fence[granules] = clock, fence

    def _check(self, addresses: Array, size: int, warps: Array, doing: str) -> Array:
        """Run the checks that reads and writes share; return the access's granules."""
        if (addresses % size).any():
            raise KernelError(f"misaligned shared {doing} of {size} bytes")
        if (addresses < 0).any() or (addresses + size > len(self.bytes)).any():
            raise KernelError(f"shared {doing} out of bounds")
        granules = pieces(addresses, size, GRANULE)
        if (self.in_flight[granules] > 0).any():
            raise KernelError(f"shared {doing} of bytes that a cp.async is still writing")
        if ((self.write_clock[granules] == self.clock) & (self.write_warp[granules] != warps[:, None])).any():
            raise KernelError(f"shared race: {doing} of what another warp wrote since the last barrier")
        return granules

    def _check_write(self, addresses: Array, size: int, warps: Array, doing: str = "write") -> Array:
        granules = self._check(addresses, size, warps, doing)
        if ((self.read_clock[granules] == self.clock) & (self.read_warp[granules] != warps[:, None])).any():
            raise KernelError("shared race: write of what another warp read since the last barrier")
        if (self.in_use[granules] > 0).any():
            raise KernelError("write to shared memory that a wgmma still reads")
        return granules
