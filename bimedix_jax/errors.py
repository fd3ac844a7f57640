"""The exception for problems that the user can fix."""

import sys
from collections.abc import Callable, Sequence


class BimedixError(Exception):
    """Something the user asked for cannot be done.

    The message is one clear sentence that names the problem and the remedy. The command line prints it as
    `error: <message>` and exits with 1. A bug of this project must stay an ordinary exception.
    """


def run_script(main: Callable[[], None]) -> None:
    """Runs the main function of a script; for a BimedixError it prints the message only and exits with 1."""
    try:
        main()
    except BimedixError as error:
        sys.exit(f"error: {error}")


def listed(names: Sequence[str], limit: int = 3) -> str:
    """'a, b, c and 17 more': names for an error message."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
