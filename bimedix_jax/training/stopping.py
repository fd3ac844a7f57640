"""Graceful stop on Ctrl-C and SIGTERM: finish the step in progress, save the state, print how to resume."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console


class Interrupted(KeyboardInterrupt):
    """The run was stopped after saving. The message names the command that resumes it. The exit code is 130."""


class StopRequest:
    """Within the block, the first SIGINT or SIGTERM sets `requested`. A second one interrupts immediately.

    Only the main thread can handle signals. In other threads nothing is installed.
    """

    def __init__(self, console: Console):
        self.console, self.requested = console, False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt("stopped immediately; the last checkpoint is kept")
        self.requested = True
        self.console.print("stopping: finishing this step and saving (repeat to stop immediately)", highlight=False)
