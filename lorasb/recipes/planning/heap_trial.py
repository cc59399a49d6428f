"""What malloc would hold in planned steps, tried in processes of their own, whose heaps have no holes yet, as a run's.

Where small objects fall differs from process to process, and holes with them: of two models with checkpointing in
fp32, one trial in six was more than a tenth below the median run, and none above it; so the largest of three counts
(GPT-2 medium and Qwen2.5-0.5B, Zen 3).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from random import Random

import torch
from torch import nn

from .fake_step import count_step
from .held_bytes import HeldBytes, malloc_counts
from .request import Request, dtype_of, patched

TRIALS = 3
STEPS = 2  # in the second, AdamW's state lies among the holes


@contextmanager
def heap_trial(request: Request) -> Iterator[Callable[[], int | None]]:
    """For the time of a block, a process that tries the steps of a run on this machine, and is killed at its end.

    Yields:
        waits for it: bytes that malloc would hold beyond the live tensors of the steps' peak, the largest of its
        trials; None for a run on a card, and where it cannot be told.
    """
    if request.card is not None or not sys.executable or not malloc_counts():
        yield lambda: None
        return
    given = json.dumps([asdict(request), str(dtype_of(request)).removeprefix("torch.")])
    # with this process's own path, as -m would look for modules in the current folder first
    code = f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import main; main()"
    command = [sys.executable, "-c", code, given, *sys.path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        try:
            yield lambda: _answer(process)
        finally:
            if process.poll() is None:  # else its number may be another's by now
                os.killpg(process.pid, signal.SIGKILL)  # with its trials


def _answer(process: subprocess.Popen[str]) -> int | None:
    """The largest number that it prints."""
    said = process.communicate()[0].split()
    return max((int(word) for word in said if word.isdigit()), default=None) if process.returncode == 0 else None


def main() -> None:
    """In the process: try the steps several times, each in a copy of what is imported and of the model."""
    values, dtype = json.loads(sys.argv[1])
    request = Request(**values)
    model = patched(request, getattr(torch, dtype))
    fork = get_context("fork")
    trials = [fork.Process(target=_try, args=(model, request, seed)) for seed in range(TRIALS)]
    for trial in trials:
        trial.start()
    for trial in trials:
        trial.join()


def _try(model: nn.Module, request: Request, seed: int) -> None:
    """Run the steps, and print what is held, with the heap's small objects elsewhere for each seed."""
    kept = [bytearray(size) for size in Random(seed).choices(range(100_000), k=500)]
    live = HeldBytes()  # from here on: not what making the model has imported
    count_step(model, request.batch, request.seq, request.checkpointing, live, STEPS)
    del kept
    print(live.held)
