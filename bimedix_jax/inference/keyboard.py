"""Messages from the keyboard: line editing, history, pastes of several lines, and no limit on length.

A terminal in canonical mode (the default, termios(3)) cuts a line at 4,095 bytes. So the terminal is kept in the other
mode, also between two messages, and GNU readline edits the lines. History is in memory only.
"""

import importlib.util
import select
import sys
import termios
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

PASTE_PAUSE = 0.05
"""Seconds: lines that arrive within this time after another are of one paste. People do not type so fast."""


class Keyboard:
    """`with Keyboard(...) as keyboard: keyboard.read()`; without a terminal, messages are the lines of stdin."""

    def __init__(self, prompt: str, fallback: Callable[[], str], commands: Collection[str] = (), bold: bool = True):
        """`fallback` reads a line where stdin or stdout is no terminal. A line that begins with one of `commands` is a
        message of its own, also in a paste."""
        self.prompt = f"\001\033[1m\002{prompt}\001\033[0m\002" if bold else prompt  # marked as without width
        self.fallback = fallback
        self.commands = commands
        self.queue: list[str] = []
        self.saved: list[Any] | None = None

    def __enter__(self) -> "Keyboard":
        # some builds of Python have no readline; then the terminal edits lines, and cuts long ones
        if sys.stdin.isatty() and sys.stdout.isatty() and importlib.util.find_spec("readline"):
            import readline

            self.saved = termios.tcgetattr(sys.stdin)
            readline.set_auto_history(True)
            if "libedit" not in (readline.__doc__ or ""):
                readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
                readline.parse_and_bind("tab: self-insert")
            self._set_mode(echo=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self.saved)
            self.saved = None

    def read(self) -> str:
        """The next message, of one or more lines.

        Raises:
          EOFError: the end of the input.
          KeyboardInterrupt: Ctrl-C.
        """
        if self.queue:
            return self.queue.pop(0)
        if self.saved is None:
            return self.fallback()
        self._set_mode(echo=True)  # readline shows what is typed only where the terminal echoes
        try:
            return self._message()
        finally:
            self._set_mode(echo=False)

    def _message(self) -> str:
        lines = [input(self.prompt)]
        while not self._is_command(lines[0]) and select.select([sys.stdin], [], [], PASTE_PAUSE)[0]:
            try:
                line = input()
            except EOFError:
                break
            if self._is_command(line):
                self.queue.append(line)
                break
            lines.append(line)
        return "\n".join(lines)

    def _is_command(self, line: str) -> bool:
        return line.strip().partition(" ")[0] in self.commands

    def _set_mode(self, echo: bool) -> None:
        assert self.saved is not None
        mode = [*self.saved]
        mode[3] &= ~termios.ICANON
        mode[3] = mode[3] | termios.ECHO if echo else mode[3] & ~termios.ECHO
        mode[6] = [*mode[6]]
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
