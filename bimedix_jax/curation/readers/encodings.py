"""Opens files, decompressed, and text in encodings other than UTF-8 as UTF-8."""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from bimedix_jax.curation.quarantine import WrongSource
from bimedix_jax.errors import BimedixError

BLOCK = 1 << 16
_ARABIC = re.compile(r"[\u0620-\u064a]")


class _AsUtf8(io.RawIOBase):
    """The bytes of a text, decoded from one encoding and encoded as UTF-8, in blocks."""

    def __init__(self, file: IO[bytes], encoding: str, path: Path) -> None:
        self._file, self._encoding, self._path = file, encoding, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill the buffer.

        Raises:
            WrongSource: the file is not in the encoding.
        """
        while not self._left:
            block = self._file.read(BLOCK)
            try:
                text = self._decoder.decode(block, final=not block)
            except UnicodeError as error:
                raise WrongSource(
                    f"{self._path} is not {self._encoding} text ({error}); pass another encoding="
                ) from None
            self._left = text.removeprefix("\ufeff").encode("utf-8", "surrogatepass")
            if not block:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def as_utf8(file: IO[bytes], encoding: str, path: Path) -> IO[bytes]:
    """The file, read as UTF-8; `path` is for messages."""
    return io.BufferedReader(_AsUtf8(file, encoding, path))


def check_utf8(head: bytes, path: Path) -> None:
    """Raise WrongSource, with the option to pass, if the beginning of a file is text in another encoding.

    A line that is not valid UTF-8 among others that are, or alone, is quarantined instead.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise WrongSource(f"{path} is UTF-16 text; pass encoding=utf-16")
    for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        if len(zeros) > 1 and zeros.count(0) > 0.4 * len(zeros):
            raise WrongSource(f"{path} is UTF-16 text; pass encoding={name}")
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    if len(head) == BLOCK and lines and not head.endswith(b"\n"):
        lines = lines[:-1]  # cut in the middle
    if len(lines) < 2 or any(_is_utf8(line) for line in lines):
        return
    guess = "windows-1256" if _ARABIC.search(head.decode("windows-1256", "replace")) else "latin-1"
    raise WrongSource(f"{path} is not UTF-8 text; pass its encoding, such as encoding={guess}")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def opened(path: Path, encoding: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes: decompressed if its name ends in .gz, as UTF-8 if it has another `encoding`."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            found = cast("IO[bytes]", file)
            yield found if encoding is None else as_utf8(found, encoding, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BimedixError(f"{path} is damaged ({error}); fetch it again") from error
