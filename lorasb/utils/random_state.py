"""A context that leaves the global random states as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def rng_untouched(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore Python's and torch's random states on exit: of the CPU, and of the CUDA devices with these indices."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
