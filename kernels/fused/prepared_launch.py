"""Launches prepared once for a kind of call, and repeated with other tensors of the same shapes.

Triton's own launch binds about fifty arguments by name, specializes each and looks up the kernel, and our launchers
choose its arguments: 50 µs of Python, four times per layer (Zen 5, benchmarks/results/host-time.json). All of it
depends only on shapes, strides, dtypes and alignments. So a kind of call is first made on `meta` tensors, and for each
launch its compiled kernel is stored, and which of the call's tensors each pointer belongs to. A repetition takes
addresses and passes them to the compiled kernel's own launcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from ..compat import triton as private
from ..compat.torch import storage_key
from .block_sizes import cdiv
from .launcher import Launch
from .operands import counters

ALIGNMENT = 16  # bytes; Triton compiles other kernels for pointers that are less aligned
SCRATCH_ALIGNMENT = 256  # bytes, of tensors in the scratch, as in torch's allocator
PARTIAL, COUNTERS = "partial", "counters"  # names of the arguments that launchers allocate themselves
Values = tuple[object, ...]
Position = int | slice | Callable[[Values], object]  # in Values, or a function that computes it from them
Raw = Callable[[int, Values, Sequence[Tensor]], None]  # takes stream, (*addresses, seeds) and tensors


def allocate_in_python(like: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of the dtype and on the device of another, not filled."""
    return [like.new_empty(shape) for shape in shapes]


def addresses_in_python(tensors: list[Tensor]) -> list[int] | None:
    """Addresses of tensors; None if one of them is less aligned than `ALIGNMENT`."""
    found = list(map(Tensor.data_ptr, tensors))
    return None if reduce(or_, found, 0) % ALIGNMENT else found


# replaced by the functions of lorasb's C++ extension, if it is there, which take a third of the time
allocate: Callable[[Tensor, Sequence[tuple[int, ...]]], list[Tensor]] = allocate_in_python
addresses: Callable[[list[Tensor]], list[int] | None] = addresses_in_python


def is_captured(like: Tensor) -> bool:
    """True while a CUDA graph captures what is launched for a tensor."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


class NotPreparedError(ValueError):
    """A call that has to be made the ordinary way every time."""


@dataclass(frozen=True)
class Place:
    """Source of a pointer or descriptor: bytes after the start of one of the call's tensors."""

    index: int  # of the tensor
    offset: int  # in bytes
    like: Tensor  # the argument on `meta`, of the same shape, strides and dtype
    descriptor: Any = None  # on `meta`, for an argument that is one


Nested = Place | tuple["Nested", ...]
Places = dict[str, Nested]  # by an argument's name


@dataclass(frozen=True)
class PreparedLaunch:
    """One launch."""

    call: Launch  # as it was made on `meta`
    places: Places  # of arguments that are tensors or tuples of tensors
    constants: Values  # all other arguments but the seeds of dropout
    take: Callable[[Values], Values]  # all arguments in their order, from (*addresses, seeds, *constants)


class Prepared:
    """The launches of one kind of call.

    Args:
        calls: made on `meta`.
        tensors: the call's tensors on `meta`, each with a separate storage, in the order that `repeat` takes.
        inner: tensors that only these launches read and write.

    Attributes:
        scratch: shape of one tensor that holds the inner ones and a workspace, in a list; empty if there are none.

    Raises:
        NotPreparedError: an argument is not one of these tensors, but a copy that a launcher made.
    """

    def __init__(self, calls: Sequence[Launch], tensors: Sequence[Tensor], inner: Sequence[Tensor] = ()) -> None:
        self._origins = {_storage(tensor): (i, 0) for i, tensor in enumerate(tensors)}
        size = self._lay_out(len(tensors), tensors[0].element_size(), calls, inner)
        self.scratch = [(size,)] if size else []
        self._count = max((0, *(_elements(call, COUNTERS) for call in calls)))
        self._counters = len(tensors) + len(self.scratch)  # index
        placed = [self._places(call) for call in calls]
        self._derived = sorted({(p.index, p.offset) for places in placed for p in _flat(places.values()) if p.offset})
        self.launches = [self._launch(call, places) for call, places in zip(calls, placed, strict=True)]
        self._own_zeros: Tensor | None = None
        self._raw: list[Raw] = []

    def repeat(self, tensors: list[Tensor], seeds: tuple[int, ...] = (0,)) -> bool:
        """Launch with the call's tensors and one of shape `scratch`; False, and no launch, if one is less aligned."""
        like = tensors[0]
        stream = driver.active.get_current_stream(like.get_device())
        if self._count:
            tensors = [*tensors, self._zeros(like, stream)]
        found = addresses(tensors)
        if found is None:
            return False
        found += [found[index] + offset for index, offset in self._derived]  # addresses within a tensor
        values = (*found, seeds)
        if not self._raw:
            self._raw = [bind(launch) for launch in self.launches]
        for raw in self._raw:
            raw(stream, values, tensors)
        return True

    def _zeros(self, like: Tensor, stream: int) -> Tensor:
        """Return counters; on the default stream (0) this kind's own, which every launch leaves at zero."""
        if stream or is_captured(like):
            return counters(like.device, self._count)
        if self._own_zeros is None:
            self._own_zeros = counters(like.device, self._count)
        return self._own_zeros

    def _lay_out(self, index: int, itemsize: int, calls: Sequence[Launch], inner: Sequence[Tensor]) -> int:
        """Place the inner tensors and a workspace in the scratch; its size in elements of `itemsize` bytes."""
        size = 0
        for tensor in inner:
            self._origins[_storage(tensor)] = (index, size)
            size += cdiv(tensor.numel() * tensor.element_size(), SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        for call in calls:  # one workspace for all, as they run one after another
            if PARTIAL in call.arguments:
                self._origins[_storage(call.arguments[PARTIAL])] = (index, size)
        return (size + 4 * max((0, *(_elements(call, PARTIAL) for call in calls)))) // itemsize

    def _places(self, call: Launch) -> Places:
        found = {name: self._nested(call, name, value) for name, value in call.arguments.items()}
        return {name: place for name, place in found.items() if place is not None}

    def _nested(self, call: Launch, name: str, value: object) -> Nested | None:
        """Return the places of a tensor, a descriptor or a tuple of them; None for anything else."""
        if isinstance(value, Tensor):
            return self._place(call, name, value)
        if isinstance(value, tuple) and value:
            places = [self._nested(call, name, one) for one in value]
            return tuple(place for place in places if place is not None) or None
        if hasattr(value, "block_shape"):
            return replace(self._place(call, name, value.base), descriptor=value)
        return None

    def _place(self, call: Launch, name: str, tensor: Tensor) -> Place:
        if PARTIAL in call.arguments and not _elements(call, PARTIAL):
            if _storage(tensor) == _storage(call.arguments[PARTIAL]):
                return Place(0, 0, tensor)  # a dummy, neither read nor written: any address will do
        index, start = self._origins.get(_storage(tensor), (self._counters if name == COUNTERS else -1, 0))
        offset = start + tensor.storage_offset() * tensor.element_size()
        if index < 0 or offset % ALIGNMENT:
            raise NotPreparedError(f"{name} of {call.kernel.__name__} is a copy, or not aligned")
        return Place(index, offset, tensor)

    def _launch(self, call: Launch, places: Places) -> PreparedLaunch:
        seeds = self._first_derived + len(self._derived)
        constants: list[object] = []
        indices: list[Position] = []
        for parameter in call.kernel.params:
            name = parameter.name
            if name in places:
                indices.append(self._position(places[name]))
            elif name == "seeds" and call.arguments.get("DROPOUT"):  # else a constant, compiled as the 0 that it is
                indices.append(seeds)
            else:
                indices.append(seeds + 1 + len(constants))
                constants.append(call.arguments[name])
        return PreparedLaunch(call, places, tuple(constants), _getter(indices))

    def _position(self, place: Nested) -> Position:
        """Return the position of an address in (*addresses, seeds, *constants); of a tuple, a slice."""
        if isinstance(place, Place):
            index = place.index
            if place.offset:
                index = self._first_derived + self._derived.index((place.index, place.offset))
            return index if place.descriptor is None else partial(_described, index, place.descriptor)
        positions = [self._position(one) for one in place]
        if any(map(callable, positions)):
            return _getter(positions)
        first = positions[0]
        if not isinstance(first, int) or positions != list(range(first, first + len(place))):
            raise NotPreparedError("the tensors of one argument are not adjacent")
        return slice(first, first + len(place))

    @property
    def _first_derived(self) -> int:
        return self._counters + (self._count > 0)


def bind(launch: PreparedLaunch) -> Raw:
    """Compile a launch's kernel, or find it where Triton keeps it, and load it onto the current device.

    A module global, so that tests can execute compiled kernels without a GPU.
    """
    call = launch.call
    compiled = private.compiled(call.kernel, call.grid, call.arguments, call.options)
    return private.launcher(compiled, call.grid, launch.take, launch.constants)


def _getter(positions: Sequence[Position]) -> Callable[[Values], Values]:
    """A function that returns the values at these positions; `itemgetter`, which is faster, where it can."""
    if not any(map(callable, positions)):
        return itemgetter(*positions)  # kernels have more than one parameter
    getters = [one if callable(one) else itemgetter(one) for one in positions]
    return lambda values: tuple([get(values) for get in getters])


def _described(index: int, like: Any, values: Values) -> private.Descriptor:
    return private.Descriptor(values[index], like)


def _flat(values: Iterable[Nested]) -> Iterator[Place]:
    for value in values:
        if isinstance(value, Place):
            yield value
        else:
            yield from _flat(value)


def _storage(tensor: Tensor) -> int:
    return storage_key(tensor.untyped_storage())


def _elements(call: Launch, name: str) -> int:
    """Return the size of a workspace; 0 where sums are not split and a dummy stands for it."""
    return call.arguments[name].numel() if PARTIAL in call.arguments and call.arguments[PARTIAL].numel() > 1 else 0
