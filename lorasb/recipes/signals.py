"""Ctrl-C and SIGTERM: a run ends in order after its step, and at once when asked a second time."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..distributed.process_group import Processes


class StoppedError(BaseException):
    """The user ended the run. It is no Exception, so that nothing on the way takes it for a failure of its own.

    Args:
        number: of the signal.
        line: how to go on.
    """

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.code = 128 + number


class Stop:
    """A context in which SIGINT and SIGTERM ask for an end in order.

    While `steps` is true, the first signal is only noted, for whoever trains to look at after a step. At all other
    times, and at the second signal, the run ends at once.
    """

    def __init__(self, line: str) -> None:
        self.line, self.steps = line, False
        self.requested = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
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
        """Whether any process was asked to end; all of them call this after the same step."""
        self.requested = int(processes.all_reduce_max([float(self.requested)])[0])
        return self.requested > 0

    def end(self) -> None:
        """End the run if that was asked for.

        Raises:
            StoppedError: it was.
        """
        self.steps = False
        if self.requested:
            raise StoppedError(self.requested, self.line)
