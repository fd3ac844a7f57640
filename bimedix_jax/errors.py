"""The one exception that means "the user can fix this"."""


class BimedixError(Exception):
    """Something the user asked for cannot be done.

    The message is one clear sentence that names what is wrong and how to put it right: the command line prints it as
    `error: <message>` and exits with 1. Anything that is a bug here must stay an ordinary exception.
    """
