"""Graceful stop on Ctrl-C and SIGTERM: finish the step in progress, save the state, print how to resume."""

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console

from bimedix_jax.process import signals


class Interrupted(KeyboardInterrupt):
    """The run was stopped after saving. The message names the command that resumes it. The exit code is 130."""


STOPPED = "stopped immediately; the last checkpoint is kept"


class StopRequest:
    """Within the block, the first SIGINT or SIGTERM sets `requested`. A second one interrupts immediately.

    Only the main thread can handle signals. In other threads nothing is installed.

    Args:
      command: resumes what is stopped.
    """

    def __init__(self, console: Console, command: str = ""):
        self.console, self.command, self.requested = console, command, False
        self._previous: dict[signal.Signals, Any] = {}
        self._patience = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._patience.enter_context(signals.patient())
        self._patience.enter_context(signals.hint(STOPPED))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._patience.close()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        signals.acknowledge(number)
        if self.requested:
            raise KeyboardInterrupt(STOPPED)
        self.requested = True
        self.console.print("stopping: finishing this step and saving (repeat to stop immediately)", highlight=False)
