"""Ctrl-C and SIGTERM: one sentence, exit code 130, and nothing half-written.

Normally a signal raises KeyboardInterrupt, which removes temporary files on its way out and can carry a hint, such as
how to resume. In three cases it must not, and `abandon` ends the process without unwinding:

- Python is importing a module, or JAX is tracing or compiling: libraries turn the exception into others, or lose it in
  a callback.
- The main thread does not react, for example because XLA compiles in it for minutes.
- The command has ended and JAX was loaded: XLA's threads still run while Python shuts down, which ended in a
  segmentation fault after the sentence was printed (3 of 10 interruptions of a compilation, jax 0.9).

This file imports the standard library only, since the command line loads it first.
"""

import atexit
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

FAILED, INTERRUPTED = 1, 130
GRACE_SECONDS = 2.0
"""How long the main thread has to react before another thread ends the process."""

_COMPILING = ("/jax/_src/pjit.py", "/jax/_src/compiler.py", "/jax/_src/stages.py", "/jax/_src/interpreters/")
_HANDLED = b"\0"

_cleanups: list[Callable[[], None]] = []
_hints: list[str] = []
_ending = threading.Lock()
_wakeup: int | None = None  # written to by Python's signal handling, read by _watch
_patience = 0  # number of signals whose handling in the main thread may take any time
_shields, _pending, _ended = 0, False, False
_document: int | None = None
_last = signal.SIGINT


def catch_signals() -> None:
    """Makes Ctrl-C and SIGTERM end this process as described above. Signals that are ignored stay ignored."""
    global _wakeup
    atexit.register(_ignore_signals)  # early, so that it is called after all other functions
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, received)
    reading, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def write_errors_to(document: int | None) -> None:
    """The file descriptor for the JSON document of an error; None without --json, and after it is written."""
    global _document
    _document = document


def received(number: int, frame: FrameType | None) -> None:
    """The signal handler. Raises KeyboardInterrupt where Python code can be unwound."""
    global _pending
    acknowledge(number)
    if _shields:
        _pending = True
        return
    if _ended or _is_unsafe(frame):
        abandon()
    raise KeyboardInterrupt


def command_ended() -> None:
    """From here on there is nothing to unwind: a signal ends the process at once."""
    global _ended, _document
    _ended, _document = True, None


def acknowledge(number: int) -> None:
    """Every handler of SIGINT or SIGTERM calls this, so that the process is not ended as one that does not react."""
    global _last
    _last = signal.Signals(number)
    if _wakeup is not None:
        with suppress(BlockingIOError):
            os.write(_wakeup, _HANDLED)


def sentence(*hints: Any) -> str:
    """'interrupted', by which signal if not by Ctrl-C, and the hints."""
    word = "interrupted" if _last is signal.SIGINT else "interrupted by SIGTERM"
    return ": ".join([word, *map(str, hints)])


@contextmanager
def hint(text: str) -> Iterator[None]:
    """What the sentence of an interruption within the block adds, such as how to resume; the innermost one counts."""
    _hints.append(text)
    try:
        yield
    except KeyboardInterrupt as stop:
        if text and not stop.args:
            stop.args = (text,)
        raise
    finally:
        _hints.remove(text)


@contextmanager
def on_abandon(action: Callable[[], None]) -> Iterator[None]:
    """Within the block, `abandon` calls `action`, for example to remove a temporary folder."""
    _cleanups.append(action)
    try:
        yield
    finally:
        _cleanups.remove(action)


@contextmanager
def shielded() -> Iterator[None]:
    """Delays a signal until the end of the block, for a short clean-up that must not be interrupted.

    It has no effect in other threads than the main one, which no signal interrupts.
    """
    global _shields, _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        if _pending and not _shields:
            _pending = False
            raise KeyboardInterrupt


@contextmanager
def patient() -> Iterator[None]:
    """Within the block, handling the first signal may take any time, for handlers that finish a training step."""
    global _patience
    _patience = 1
    try:
        yield
    finally:
        _patience = 0


def abandon(*hints: str) -> None:
    """Prints the sentence, cleans up, and ends the process without unwinding. Returns only if it is ending already."""
    if not _ending.acquire(blocking=False):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(3600)
        return
    text = sentence(*filter(None, hints or _hints[-1:]))
    show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{show_cursor}{text}\n".encode(errors="backslashreplace"))
    for action in reversed(_cleanups):
        with suppress(Exception):
            action()
    if _document is not None:
        with suppress(OSError):
            os.write(_document, (json.dumps({"error": text}, indent=2) + "\n").encode())
    leave(INTERRUPTED)


def fail(text: str) -> None:
    """Prints an error and ends the process from any thread, without unwinding and without the actions of `abandon`."""
    if not _ending.acquire(blocking=False):
        return
    with suppress(OSError):
        os.write(2, f"error: {text}\n".encode(errors="backslashreplace"))
    if _document is not None:
        with suppress(OSError):
            os.write(_document, (json.dumps({"error": text}, indent=2) + "\n").encode())
    leave(FAILED)


def leave(code: int) -> None:
    """Ends the process without Python's shutdown, which can crash while XLA's threads run. Child processes end too."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    with suppress(Exception):
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    os._exit(code)


def _ignore_signals() -> None:
    """Python's shutdown restores the default handlers, with which a signal would end a command that has succeeded."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _is_unsafe(frame: FrameType | None) -> bool:
    """Whether a module is being imported, or JAX traces or compiles."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib") or any(part in name for part in _COMPILING):
            return True
        frame = frame.f_back
    return False


def _watch(reading: int) -> None:
    """Ends the process if the main thread does not handle a signal."""
    global _last, _patience
    signals = (signal.SIGINT, signal.SIGTERM)
    while byte := os.read(reading, 1):
        if byte[0] not in signals:
            continue
        if _patience:
            _patience -= 1
            continue
        deadline = time.monotonic() + GRACE_SECONDS
        while byte != _HANDLED:
            if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if byte[0] in signals:
                    _last = signal.Signals(byte[0])
                abandon()
            byte = os.read(reading, 1)
