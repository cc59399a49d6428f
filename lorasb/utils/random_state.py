"""A context that leaves the global random states as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def rng_untouched() -> Iterator[None]:
    """Restore Python's and torch's random states on exit: of the CPU and, once CUDA is in use, of every GPU."""
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
