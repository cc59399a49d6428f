"""What malloc would hold in a planned step, tried in a process of its own, whose heap has no holes yet, as a run's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from .fake_step import count_step
from .held_bytes import HeldBytes, malloc_counts
from .request import Request, dtype_of, patched


@contextmanager
def heap_trial(request: Request) -> Iterator[Callable[[], int | None]]:
    """For the time of a block, a process that tries the step of a run on this machine.

    Yields:
        waits for it: bytes that malloc would hold beyond the live tensors of the step's peak; None for a run on a
        card, and where it cannot be told.
    """
    if request.card is not None or not sys.executable or not malloc_counts():
        yield lambda: None
        return
    given = json.dumps([asdict(request), str(dtype_of(request)).removeprefix("torch.")])
    # with this process's own path, as -m would look for modules in the current folder first
    code = f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import main; main()"
    command = [sys.executable, "-c", code, given, *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield lambda: _answer(process)
        finally:
            process.kill()


def _answer(process: subprocess.Popen[str]) -> int | None:
    said = process.communicate()[0].split()
    return int(said[-1]) if process.returncode == 0 and said and said[-1].isdigit() else None


def main() -> None:
    """In the process: run the step, and print what is held."""
    values, dtype = json.loads(sys.argv[1])
    request = Request(**values)
    model = patched(request, getattr(torch, dtype))
    live = HeldBytes()  # from here on: not what making the model has imported
    count_step(model, request.batch, request.seq, request.checkpointing, live)
    print(live.held)
