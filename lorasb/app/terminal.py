"""The console of all commands (quiet on ranks other than 0), and one for errors on stderr."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:  # imports torch and PEFT, which `lorasb --help` does without
    from ..distributed.process_group import Processes


console = Console(soft_wrap=False)
errors = Console(stderr=True)


class StoppedError(BaseException):
    """The user stopped the run. A BaseException, as KeyboardInterrupt is, so that no `except Exception` swallows it."""

    def __init__(self, number: int, line: str) -> None:  # the signal's number, and how to resume
        super().__init__(line)
        self.code = 128 + number  # exit code, by the shells' convention


class Stop:
    """A context in which SIGINT and SIGTERM raise StoppedError.

    While `steps` is True, the first one only sets `requested`, which the training loop checks after each step.
    """

    def __init__(self, line: str) -> None:
        self.line, self.steps = line, False
        self.requested = 0  # number of the signal that asked for a stop; 0 if none
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}  # handlers

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # signal.signal raises in other threads
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.steps:
            raise StoppedError(number, self.line)
        self.requested = number

    def agreed(self, processes: Processes) -> bool:
        """True if any rank got a signal; collective, called by every rank after the same step."""
        # A signal may reach one rank only, and a rank that stopped alone would leave the others in a collective
        self.requested = int(processes.all_reduce_max([float(self.requested)])[0])
        return self.requested > 0

    def end(self) -> None:
        """Leave the training loop; stop the run if a signal came."""
        self.steps = False
        if self.requested:
            raise StoppedError(self.requested, self.line)
