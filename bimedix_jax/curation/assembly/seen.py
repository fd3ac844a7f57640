"""Which keys were seen, and with whom first: on disk, so that the number of records does not decide the memory."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_MIB = 64
"""Memory of the index; the operating system caches the rest of the file as far as it has room."""


class Seen:
    """A table key -> owner in an SQLite file. Make it with `seen`, which removes the file afterwards."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def claim(self, key: bytes, owner: str) -> str | None:
        """Whoever claimed `key` before; None if nobody did, and then it is `owner`'s."""
        done = self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, owner))
        return None if done.rowcount == 1 else self.owner(key)

    def owner(self, key: bytes) -> str | None:
        """Whoever claimed `key`, None if nobody did."""
        row = self._connection.execute("SELECT owner FROM seen WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])


@contextmanager
def seen(path: Path) -> Iterator[Seen]:
    """An empty `Seen` at `path`, which is removed at the end: a scratch file, not kept safe against a crash."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute(f"PRAGMA cache_size = -{CACHE_MIB << 10}")
        connection.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, owner TEXT) WITHOUT ROWID")
        connection.execute("BEGIN")
        yield Seen(connection)
    finally:
        connection.close()
        path.unlink(missing_ok=True)
