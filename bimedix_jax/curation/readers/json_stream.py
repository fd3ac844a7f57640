"""The entries of a large JSON file, one at a time, in the memory of one entry.

json.load reads a whole document, but published data sets are single arrays of up to 700 MB. The decoder of the standard
library can start at any position of a text, so entries are decoded one by one at the speed of its C scanner.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import WrongSource
from bimedix_jax.errors import BimedixError

CHUNK = 1 << 20
MAX_ENTRY = 64 << 20
"""Most characters of one entry; bounds the memory. A file with a longer entry is refused."""

IN_ROWS = {
    "conversations",
    "conversation",
    "messages",
    "turns",
    "dialogue",
    "dialog",
    "utterances",
    "options",
    "choices",
}
IN_ROWS |= {"answers", "candidates"}
"""Keys whose arrays of objects are parts of one row, not rows."""

MAX_KEYS = 100
"""Most keys and arrays that `outline` lists."""

MAX_DEPTH = 3
"""Levels of keys that `outline` enters."""


class BrokenJson(BimedixError):
    """A file is not the JSON that it should be."""


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
    for value in text.elements():
        yield None, value
    text.end()


def keyed_entries(file: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of each entry of a file that is one JSON object.

    Raises:
        BimedixError: the file is not one JSON object.
    """
    text = _Window(file, path)
    for key in text.each_key():
        yield key, text.value()
    text.end()


def entries_under(file: IO[bytes], path: Path, keys: Sequence[str]) -> Iterator[tuple[str | None, Any]]:
    """(key or None, value) of each entry of the array or object under nested keys of a file that is one object.

    Raises:
        BimedixError: the file is not JSON, has no such key, or has no array or object there.
    """
    text = _Window(file, path)
    for number, key in enumerate(keys):
        at = ".".join(keys[:number]) or "the file"
        if text.peek() != "{":
            raise BimedixError(f"{at} of {path} is not an object, so it has no key {key!r}; name another with key=")
        passed: list[str] = []
        for found in text.each_key():
            if found == key:
                break
            passed.append(found)
            text.skip()
        else:
            raise BimedixError(f"{at} of {path} has no key {key!r}; its keys are {', '.join(passed[:30])}")
    if text.peek() == "[":
        for value in text.elements():
            yield None, value
    elif text.peek() == "{":
        for key in text.each_key():
            yield key, text.value()
    else:
        raise BimedixError(f"{'.'.join(keys)} of {path} is neither an array nor an object; name another key with key=")


def outline(file: IO[bytes], path: Path) -> "Outline | None":
    """Where a file that is one object has arrays of objects; None if it is not exactly one object.

    Raises:
        BimedixError: the file is not JSON.
    """
    text = _Window(file, path)
    if text.peek() != "{":
        return None
    found = Outline()
    _walk(text, (), found)
    return None if text.peek() else found


@dataclass
class Outline:
    """The keys of a file that is one object.

    Attributes:
      keys: those of the object itself, at most MAX_KEYS, and `objects`, whether the values of all of them are objects.
      arrays: number of entries of each array of objects, by its nested keys joined with a dot.
    """

    keys: list[str] = field(default_factory=list)
    objects: bool = True
    arrays: dict[str, int] = field(default_factory=dict)


def keys_of_rows(file: IO[bytes], path: Path, name: str, account: SourceAccount) -> list[str] | None:
    """Nested keys of the rows in a file that is one object; None if it holds rows side by side or is itself a row.

    Raises:
        WrongSource: several keys have arrays of objects.
    """
    try:
        found = outline(file, path)
    except BrokenJson:
        return None  # the lines or entries before the error are rows, and it is raised when they have been read
    if found is None:
        return None
    arrays = {key: number for key, number in found.arrays.items() if key.rpartition(".")[2] not in IN_ROWS}
    if len(arrays) > 1:
        listed = ", ".join(f"{key} ({number:,})" for key, number in list(arrays.items())[:12])
        raise WrongSource(f"{path} is one object with rows under several keys: {listed}; name one with key=")
    if arrays:
        key = next(iter(arrays))
        account.note(f"rows: those under the key {key!r} of {name}; key= decides otherwise")
        return key.split(".")
    if found.objects and len(found.keys) > 1:
        account.note(f"rows: one for each key of {name}")
        return []
    return None


def _walk(text: "_Window", at: tuple[str, ...], found: Outline) -> None:
    for key in text.each_key():
        opening = text.peek()
        if not at and len(found.keys) < MAX_KEYS:
            found.keys.append(key)
        found.objects &= bool(at) or opening == "{"
        if opening == "{" and len(at) < MAX_DEPTH - 1:
            _walk(text, (*at, key), found)
        elif opening == "[":
            first, number = None, 0
            for number, value in enumerate(text.elements(), start=1):
                first = value if number == 1 else first
            if isinstance(first, dict) and len(found.arrays) < MAX_KEYS:
                found.arrays[".".join((*at, key))] = number
        else:
            text.skip()


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

    def elements(self) -> Iterator[Any]:
        """The values of the array that is next."""
        self.take("[")
        if self.peek() != "]":
            while True:
                yield self.value()
                if self.peek() != ",":
                    break
                self.take(",")
        self.take("]")

    def each_key(self) -> Iterator[str]:
        """The keys of the object that is next. After each, consume its value."""
        self.take("{")
        if self.peek() != "}":
            while True:
                key = self.value()
                if not isinstance(key, str):
                    raise self.broken(f"a key is {key!r}")
                self.take(":")
                yield key
                if self.peek() != ",":
                    break
                self.take(",")
        self.take("}")

    def skip(self, depth: int = 0) -> None:
        """Consume the next value in the memory of one of its entries."""
        opening = self.peek()
        if opening == "[":
            for _ in self.elements():
                pass
        elif opening == "{" and depth < MAX_DEPTH:
            for _ in self.each_key():
                self.skip(depth + 1)
        else:
            self.value()

    def end(self) -> None:
        """Check that only spaces follow."""
        if self.peek():
            raise self.broken(f"{self.peek()} after the end of the document")

    def broken(self, problem: str) -> BimedixError:
        """The error to raise at the current position."""
        where = self._used + self._at
        return BrokenJson(f"{self._path} is not valid JSON near character {where:,} ({problem}); fetch it again")

    def _read(self, size: int) -> None:
        data = self._file.read(size)
        self._ended = not data
        try:
            more = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error
        self._used += self._at
        self._text, self._at = self._text[self._at :] + more, 0
