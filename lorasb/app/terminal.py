"""The console of all commands (quiet on ranks other than 0), and one for errors on stderr."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from rich.console import Console

console = Console(soft_wrap=False)
errors = Console(stderr=True)


class StoppedError(BaseException):
    """The user stopped the run. A BaseException, like KeyboardInterrupt, so that no `except Exception` swallows it."""

    def __init__(self, number: int) -> None:  # the signal's number
        super().__init__("stopped: rerun the same command to resume")
        self.code = 128 + number  # exit code, by the shells' convention


class Stop:
    """A context in which SIGINT and SIGTERM raise StoppedError.

    While `steps` is True, the first signal only sets `requested`, which the training loop checks after each step.
    """

    def __init__(self) -> None:
        self.steps = False
        self.requested = 0  # number of the signal that asked for a stop, on any rank; 0 if none
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}  # earlier handlers

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # signal.signal raises in other threads
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.steps:
            raise StoppedError(number)
        self.requested = number

    def end(self) -> None:
        """Mark the end of the training loop; raise StoppedError if a signal came."""
        self.steps = False
        if self.requested:
            raise StoppedError(self.requested)
