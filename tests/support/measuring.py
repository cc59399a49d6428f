"""Measure the bytes a call allocates and the tensors it saves for backward; set its threads and instruction set."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import lorasb
from lorasb.backends import cpp

SETS = cpp.instruction_sets() if cpp.missing() is None else []  # of this processor


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Make the C++ kernels use one of this processor's instruction sets."""
    cpp.use_instruction_set(name)
    try:
        yield
    finally:
        cpp.use_instruction_set("")


@contextmanager
def kernels(name: str) -> Iterator[str]:
    """Use the backend that a `kernel` fixture names: eager torch, or the C++ kernels with an instruction set."""
    if name in SETS:
        with instruction_set(name), lorasb.backend("cpp"):
            yield name
    else:
        with lorasb.backend("eager"):
            yield name


@contextmanager
def saved_for_backward(own: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors that autograd saves inside the block, each storage once, except the call's operands `own`."""
    known, kept = {tensor.data_ptr() for tensor in own}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            known.add(tensor.data_ptr())
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes held after each allocation and release inside the block, in order; filled when the block ends."""
    held: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield held
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held.append((held[-1] if held else 0) + event.nbytes())
