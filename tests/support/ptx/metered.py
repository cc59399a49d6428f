"""What one launch would ask of a card, counted from its compiled code: a few programs are executed for all.

Programs of a launch that share a row block or a tile do the same work as those of any other, up to the edges; they are
executed with the launch's own arguments, over memory that has addresses and no bytes, so that a launch of any size can
be counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch

from .formats import Array
from .global_memory import ALIGNMENT, GlobalMemory
from .launch import Compiled, flattened, parameter_values, parsed
from .program import Instruction
from .shared_memory import SharedMemory
from .thread_block import ThreadBlock
from .work import Work, sectors, wavefronts


class MeteredShared(SharedMemory):
    """Shared memory that counts the wavefronts of lanes; copies by descriptor pass beside them."""

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
    """What these programs of a launch ask for, executed in this order. Its tensors may lie on `meta`."""
    program, work = parsed(compiled.ptx), Work()
    arguments = flattened(launch, compiled.signature)
    memory, values = AddressSpace(work), parameter_values(program, arguments, compiled.descriptors, _laid_out())
    for i in programs:
        block = MeteredBlock(program, memory, compiled.shared, values, i, launch.grid)
        block.work, block.shared = work, MeteredShared(compiled.shared, work)
        block.run()
    return work


def _laid_out() -> Callable[[torch.Tensor], int]:
    """Addresses of tensors that lie far apart."""
    starts = count(ALIGNMENT, 1 << 40)
    return cache(lambda tensor: next(starts))
