"""The entries of a large JSON file, one at a time, in the memory of one entry.

json.load reads a whole document, but published data sets are single arrays of up to 700 MB. The decoder of the standard
library can start at any position of a text, so entries are decoded one by one at the speed of its C scanner.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bimedix_jax.errors import BimedixError

CHUNK = 1 << 20
MAX_ENTRY = 64 << 20
"""Most characters of one entry; bounds the memory. A file with a longer entry is refused."""

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_MORE_OF_A_NUMBER = "0123456789.eE+-"


def entries(file: IO[bytes], path: Path) -> Iterator[tuple[str | None, Any]]:
    """(None, value) of each entry of a file that is one array, or of each of several concatenated values.

    For a file that is one object with an entry per row, use `keyed_entries`.

    Raises:
        BimedixError: the file is not JSON. Entries before the error have been yielded.
    """
    text = _Window(file, path)
    if text.peek() != "[":
        while text.peek():
            yield None, text.value()
        return
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        while True:
            yield None, text.value()
            if text.peek() != ",":
                break
            text.take(",")
        text.take("]")
    text.end()


def keyed_entries(file: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of each entry of a file that is one JSON object.

    Raises:
        BimedixError: the file is not one JSON object.
    """
    text = _Window(file, path)
    text.take("{")
    if text.peek() == "}":
        text.take("}")
    else:
        while True:
            key = text.value()
            if not isinstance(key, str):
                raise text.broken(f"a key is {key!r}")
            text.take(":")
            yield key, text.value()
            if text.peek() != ",":
                break
            text.take(",")
        text.take("}")
    text.end()


class _Window:
    """The part of a file that is decoded but not yet consumed."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._used = 0  # characters before the window
        self._ended = False

    def peek(self) -> str:
        """The next character that is not a space, "" at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read(CHUNK)

    def take(self, character: str) -> None:
        """Consume `character`, which must be next."""
        found = self.peek()
        if found != character:
            raise self.broken(f"{found or 'the end'} where {character} is expected")
        self._at += 1

    def value(self) -> Any:
        """The next value. A number is complete only if the next character ends it: 12 could continue as 12.5."""
        self.peek()
        while True:
            problem = "the file ends within a value"
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                problem = error.msg
            except RecursionError:
                raise self.broken("values are nested too deeply") from None
            else:
                if self._ended or (end < len(self._text) and self._text[end] not in _MORE_OF_A_NUMBER):
                    self._at = end
                    return value
            if self._ended or len(self._text) - self._at > MAX_ENTRY:
                raise self.broken(problem)
            self._read(
                max(CHUNK, len(self._text) - self._at)
            )  # doubling keeps the work linear in the length of the text

    def end(self) -> None:
        """Check that only spaces follow."""
        if self.peek():
            raise self.broken(f"{self.peek()} after the end of the document")

    def broken(self, problem: str) -> BimedixError:
        """The error to raise at the current position."""
        where = self._used + self._at
        return BimedixError(f"{self._path} is not valid JSON near character {where:,} ({problem}); fetch it again")

    def _read(self, size: int) -> None:
        data = self._file.read(size)
        self._ended = not data
        try:
            more = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error
        self._used += self._at
        self._text, self._at = self._text[self._at :] + more, 0
