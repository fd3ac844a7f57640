"""Ctrl-C and SIGTERM as a request: the step in progress ends, the state is saved, the way to go on is said."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console


class Interrupted(KeyboardInterrupt):
    """The run stopped on request after saving; the message says how to continue. Exit code 130 on the command line."""


class StopRequest:
    """Within the block, the first SIGINT or SIGTERM sets `asked`; a second one interrupts at once.

    Signals reach the main thread only; elsewhere (a notebook's worker, say) nothing is installed.
    """

    def __init__(self, console: Console):
        self.console, self.asked = console, False
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
        if self.asked:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept")
        self.asked = True
        self.console.print("stopping: finishing this step and saving (again to stop at once)", highlight=False)
