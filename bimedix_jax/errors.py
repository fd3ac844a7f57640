"""The exception for problems that the user can fix."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class BimedixError(Exception):
    """Something the user asked for cannot be done.

    The message is one clear sentence that names the problem and the remedy. The command line prints it as
    `error: <message>` and exits with 1. A bug of this project must stay an ordinary exception.

    `document` is what `--json` prints besides the message.
    """

    def __init__(self, *message: object, document: dict[str, Any] | None = None):
        super().__init__(*message)
        self.document = document or {}


class UsageError(Exception):
    """The command line itself is wrong: the command prints `error: <message>` and exits with 2."""


def run_script(main: Callable[[], None]) -> None:
    """Runs the main function of a script. For a BimedixError, and for problems of files and memory, it prints one
    sentence and exits with 1."""
    try:
        main()
    except BimedixError as error:
        sys.exit(f"error: {error}")
    except (OSError, MemoryError) as error:
        if (problem := problem_of(error)) is None:
            raise
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def positive(text: str) -> int:
    """A number on the command line of a script, at least 1."""
    return at_least(1, text)


def natural(text: str) -> int:
    """A number on the command line of a script, at least 0."""
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is too small; give at least {least}")
    return number


def listed(names: Sequence[str], limit: int = 3) -> str:
    """'a, b, c and 17 more': names for an error message."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "write to another place",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "correct the path, a part of which is a file",
    errno.EISDIR: "name a file instead of a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.EIO: "check the disk",
    errno.EADDRINUSE: "stop the program that uses the port, or choose another port",
    errno.EADDRNOTAVAIL: "choose an address of this machine",
    errno.ECONNREFUSED: "start the server, or correct its address",
}
"""What helps against an error of the operating system."""
_NUMBER = re.compile(r"\[os_error_code='(\d+)'\]")
"""How TensorStore reports an error of the operating system, in a ValueError."""
_FULL = ("No space left on device", "os error 28", "disk is full", "Disk quota exceeded")


def is_full(error: BaseException) -> bool:
    """Whether the disk is full. Libraries in C++ and Rust report it in exceptions of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return not isinstance(error, BimedixError) and any(sign in str(error) for sign in _FULL)


def problem_of(error: BaseException) -> str | None:
    """A sentence for an error of the operating system, of memory or of an encoding; None for any other."""
    for cause in _causes(error):
        if found := _NUMBER.search(str(cause)):
            number = int(found[1])
            cause = OSError(number, os.strerror(number))
        if is_full(cause):
            place = getattr(cause, "filename", None)
            return f"no space is left{f' for {place}' if place else ' on the device'}; {REMEDIES[errno.ENOSPC]}"
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            place = cause.filename if isinstance(cause.filename, str | bytes) else None
            problem = f"{place}: {cause.strerror}" if place else cause.strerror
            return "; ".join([problem, *filter(None, [REMEDIES.get(cause.errno)])])
        if isinstance(cause, MemoryError):
            return "memory ran out; choose a smaller model or batch, or close other programs"
        if isinstance(cause, UnicodeEncodeError) and any(
            "\ud800" <= letter <= "\udfff" for letter in str(cause.object)
        ):
            return (
                "a text contains half a surrogate pair or bytes that are not UTF-8, so it cannot be written; correct it"
            )
        if isinstance(cause, UnicodeDecodeError):
            byte = cause.object[cause.start]
            return f"the input is not UTF-8 (byte 0x{byte:02x} at position {cause.start}); convert it, e.g. with iconv"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the errors that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
