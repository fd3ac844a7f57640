"""The keyboard on a pseudo-terminal: long lines, pastes, editing, history, and a terminal that is restored."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

PROGRAM = """
import json, sys
from bimedix_jax.inference.keyboard import Keyboard
with Keyboard("you> ", lambda: input("you> "), ("/quit",)) as keyboard, open(sys.argv[1], "w") as file:
    while True:
        try:
            text = keyboard.read()
        except EOFError:
            break
        print(json.dumps(text), file=file, flush=True)
        if text == "/quit":
            break
"""


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command, **environment):
        self.master, self.slave = pty.openpty()
        self.screen = b""
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=os.environ | {"TERM": "xterm-256color", "INPUTRC": "/dev/null"} | environment,
            start_new_session=True,
        )

    def drain(self, seconds=0.0):
        while select.select([self.master], [], [], seconds)[0]:
            self.screen += os.read(self.master, 65536)

    def wait_for(self, text, seconds=120.0):
        """Waits until the program has written `text` since the last call."""
        end = time.monotonic() + seconds
        while text.encode() not in self.screen:
            assert time.monotonic() < end, self.screen.decode(errors="replace")
            assert self.process.poll() is None, self.screen.decode(errors="replace")
            self.drain(0.1)
        shown, self.screen = self.screen.decode(errors="replace"), b""
        return shown

    def send(self, text):
        data = text.encode()
        while data:
            self.drain()
            data = data[os.write(self.master, data[:512]) :]

    def close(self, seconds=60.0):
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.drain(0.1)
        if self.process.poll() is None:
            self.process.kill()
        self.drain()
        os.close(self.master)
        os.close(self.slave)
        return self.process.wait()


@pytest.fixture
def typed(tmp_path):
    """The messages that a program reads for what is typed after each prompt."""
    found = tmp_path / "found"

    def messages(*parts):
        terminal = Terminal([sys.executable, "-c", PROGRAM, str(found)])
        for part in parts:
            terminal.wait_for("you> ")
            terminal.send(part)
        assert terminal.close() == 0
        return [json.loads(line) for line in found.read_text().splitlines()]

    return messages


def test_a_long_line_is_whole(typed):
    text = "سؤال طويل " * 700 + "end"
    assert len(text.encode()) > 3 * 4096
    assert typed(f"{text}\r", "/quit\r") == [text, "/quit"]


@pytest.mark.parametrize("end", ["\r", "\n"])
def test_a_paste_is_one_message(typed, end):
    pasted = f"first line{end}{end}second line{end}/quit is a word here"
    assert typed(f"\033[200~{pasted}\033[201~\r", "/quit\r") == [pasted.replace("\r", "\n"), "/quit"]


def test_a_long_paste_is_one_message(typed):
    lines = [f"{number}: {'word ' * 40}".strip() for number in range(60)]
    assert typed(f"\033[200~{chr(13).join(lines)}\033[201~\r", "/quit\r") == ["\n".join(lines), "/quit"]


def test_a_paste_without_marks_is_one_message_until_a_command(typed):
    assert typed("first line\nsecond line\n/quit\n") == ["first line\nsecond line", "/quit"]


def test_lines_can_be_edited_and_recalled(typed):
    left, up, backspace = "\033[D", "\033[A", "\177"
    found = typed(f"helo{left}l\r", f"س{backspace}ص\r", f"{up}{up}\r", "/quit\r")
    assert found == ["hello", "ص", "hello", "/quit"]


def test_without_a_terminal_each_line_is_a_message(tmp_path):
    found = tmp_path / "found"
    command = [sys.executable, "-c", PROGRAM, str(found)]
    subprocess.run(command, input="one\ntwo\n", text=True, check=True, capture_output=True)
    assert [json.loads(line) for line in found.read_text().splitlines()] == ["one", "two"]
