"""Execute a recorded launch on CPU tensors: compiled as by Triton's own launcher, its programs in any order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from .formats import Array
from .global_memory import ALIGNMENT, RED_ZONE, GlobalMemory
from .program import KernelError, Program
from .tensor_copies import TensorMap
from .thread_block import ThreadBlock

MOST_PROGRAMS = 4096  # at about a millisecond to a second each
MOST_BYTES = 1 << 30


class FakeDriver:
    """The part of a CUDA driver that Triton's compiler needs: the architecture."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@dataclass(frozen=True)
class Compiled:
    """A kernel for one specialization of its arguments."""

    ptx: str
    shared: int
    signature: dict[str, Any]
    descriptors: list[dict[str, Any]] = field(default_factory=list)  # the boxes of tensor copies, by argument


def compile_launch(launch: Any, driver: FakeDriver) -> Compiled:
    """Compile a launch's kernel for its exact arguments: alignment, divisibility and values of 1 matter."""
    from triton.runtime import driver as active

    active.set_active(driver)  # permanently: without a card there is no other to restore
    kernel = launch.kernel.run(grid=(launch.grid,), warmup=True, **launch.arguments, **launch.options)
    descriptors = list(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    return Compiled(kernel.asm["ptx"], kernel.metadata.shared, dict(kernel.src.signature), descriptors)


parsed = cache(Program.parse)


def orders_of(grid: int, seed: int, every_last: bool = False) -> list[list[int]]:
    """One shuffled order of the programs; or several, in which each program in turn comes last."""
    generator = np.random.default_rng(seed)
    shuffled: list[int] = generator.permutation(grid).tolist()
    if not every_last:
        return [shuffled]
    others = ([p for p in generator.permutation(grid).tolist() if p != last] + [last] for last in range(grid))
    return [shuffled, *others]


def execute(
    launch: Any,
    compiled: Compiled,
    orders: Iterable[Sequence[int]],
    before: Collection[int] = (),
) -> set[int]:
    """Run a launch on CPU tensors; return pointers to storages it wrote. `before`: those of one that may overlap."""
    program, written = parsed(compiled.ptx), set[int]()
    if launch.grid > MOST_PROGRAMS:
        raise KernelError(
            f"{launch.name} has {launch.grid} programs, more than the interpreter executes ({MOST_PROGRAMS}): "
            "run it on a smaller shape"
        )
    arguments = flattened(launch, compiled.signature)
    bases = (getattr(argument, "base", argument) for argument in arguments)  # a descriptor's tensor
    found = [one.untyped_storage() for one in bases if isinstance(one, torch.Tensor)]
    storages = {storage.data_ptr(): storage for storage in found if storage.nbytes()}
    size = sum(storage.nbytes() + RED_ZONE + 2 * ALIGNMENT for storage in storages.values()) + 4 * RED_ZONE
    if size > MOST_BYTES:
        raise KernelError(
            f"{launch.name} needs {size:,} bytes, more than the interpreter's {MOST_BYTES:,}: run a smaller shape"
        )
    final: dict[int, Array] | None = None
    for order in orders:
        memory, places = _arena(storages, size)
        memory.pending = {places[pointer] for pointer in before if pointer in places}
        values = parameter_values(program, arguments, compiled.descriptors, partial(_address, places))
        for i in order:
            ThreadBlock(program, memory, compiled.shared, values, i, launch.grid).run()
        _check_counters(memory, launch.name)
        written.update(_written(memory, places))
        results = {p: memory.content(places[p], s.nbytes()).copy() for p, s in storages.items()}
        if final is not None and any(not np.array_equal(results[p], final[p]) for p in _written(memory, places)):
            raise KernelError(f"{launch.name}: the result depends on the order in which programs run")
        final = final or results
    for pointer, content in (final or {}).items():
        bytes_of(storages[pointer])[:] = content
    return written


def flattened(launch: Any, signature: dict[str, Any]) -> list[Any]:
    """The run-time arguments in the order of the PTX's parameters: tuples flattened, constants left out."""

    def members(kind: Any, value: Any) -> list[Any]:
        if isinstance(kind, tuple):
            return [one for pair in zip(kind, value, strict=True) for one in members(*pair)]
        return [] if kind == "constexpr" else [value]

    names = [parameter.name for parameter in launch.kernel.params]
    return [one for name in names for one in members(signature[name], launch.arguments[name])]


def _arena(storages: dict[int, Any], size: int) -> tuple[GlobalMemory, dict[int, int]]:
    memory = GlobalMemory(size)
    places = {pointer: memory.allocate(bytes_of(storage), pointer % 16) for pointer, storage in storages.items()}
    return memory, places


def bytes_of(storage: Any) -> Array:
    """The memory of a storage."""
    return np.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


def parameter_values(
    program: Program, arguments: list[Any], descriptors: list[dict[str, Any]], address_of: Callable[[torch.Tensor], int]
) -> dict[int, int | float | TensorMap]:
    """Parameter values by byte offset; Triton adds two pointers to scratch memory, which are not used here."""
    given: list[Any] = []
    boxes = iter(descriptors)
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            given.append(address_of(argument))
        elif hasattr(argument, "block_shape"):  # a descriptor, then its shape and strides as numbers
            given.append(tensor_map(argument, address_of(argument.base), next(boxes)))
            given += [*argument.shape, *argument.strides]
        else:
            given.append(argument)
    return program.placed([*given, 0, 0])


def tensor_map(descriptor: Any, start: int, box: dict[str, Any]) -> TensorMap:
    """The map that Triton's launcher would encode for a descriptor and the kernel's box."""
    rows, columns = descriptor.shape
    width = {0: 0, 1: 32, 2: 64, 3: 128}[box["swizzle"]]
    return TensorMap(start, (rows, columns), descriptor.strides[0], tuple(box["block_size"]), box["elem_size"], width)


def _address(places: dict[int, int], tensor: torch.Tensor) -> int:
    return int(places.get(tensor.untyped_storage().data_ptr(), 0) + tensor.storage_offset() * tensor.element_size())


def _written(memory: GlobalMemory, places: dict[int, int]) -> list[int]:
    starts = {allocation.start for allocation in memory.allocations if allocation.written}
    return [pointer for pointer, start in places.items() if start in starts]


def _check_counters(memory: GlobalMemory, name: str) -> None:
    words = memory.bytes.view(np.uint32)
    left = [address for address in memory.counters if words[address // 4]]
    if left:
        raise KernelError(
            f"{name} leaves {len(left)} of its arrival counters above zero: the next launch would miscount"
        )
