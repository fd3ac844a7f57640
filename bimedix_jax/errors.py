"""The one exception that means "the user can fix this"."""

import sys
from collections.abc import Callable, Sequence


class BimedixError(Exception):
    """Something the user asked for cannot be done.

    The message is one clear sentence that names what is wrong and how to put it right: the command line prints it as
    `error: <message>` and exits with 1. Anything that is a bug here must stay an ordinary exception.
    """


def run_script(main: Callable[[], None]) -> None:
    """Runs a script as the command line runs commands: of a BimedixError only its sentence is printed, exit code 1."""
    try:
        main()
    except BimedixError as error:
        sys.exit(f"error: {error}")


def listed(names: Sequence[str], limit: int = 3) -> str:
    """'a, b, c and 17 more': names for an error message."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
