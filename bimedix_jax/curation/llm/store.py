"""The ledger on disk: every attempt with its reply and its usage, committed before the reply is used.

SQLite in WAL mode. An attempt is stored as open before its request is sent, so that requests of a killed process that
may have been paid for are known. How it ended is synced to disk before the reply is used. A lock lets only one process
open a store.
"""

import contextlib
import fcntl
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from bimedix_jax.curation.llm.outcomes import UNKNOWN_COST, Attempt, Ending
from bimedix_jax.curation.llm.request import Usage
from bimedix_jax.errors import BimedixError

VERSION = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (
    key TEXT NOT NULL, number INTEGER NOT NULL,
    stage TEXT NOT NULL, model TEXT NOT NULL, item TEXT NOT NULL, round INTEGER NOT NULL, prompt_hash TEXT NOT NULL,
    batch TEXT,                                             -- mark of the batch it was sent in
    most_prompt INTEGER NOT NULL, most_completion INTEGER NOT NULL,
    ending TEXT,                                            -- NULL while it is open
    status INTEGER, detail TEXT, finish_reason TEXT, text TEXT,
    prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER,
    started REAL NOT NULL, seconds REAL,
    PRIMARY KEY (key, number)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS open_attempts ON attempts (key, number) WHERE ending IS NULL;
CREATE TABLE IF NOT EXISTS batches (mark TEXT PRIMARY KEY, base_url TEXT NOT NULL, id TEXT, done INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Heading:
    """The columns of the ledger that are known before sending; `most` is the maximum number of tokens."""

    key: str
    stage: str
    model: str
    item: str
    round: int
    prompt_hash: str
    most: Usage


@dataclass(frozen=True)
class LedgerRow:
    """Sums over the attempts of one stage with one model, batched or not.

    `failed` attempts brought no reply; `unknown` of them may have been paid for, with at most `unknown_tokens`.
    """

    stage: str
    model: str
    batched: bool
    requests: int
    attempts: int
    replies: int
    failed: int
    unknown: int
    without_usage: int
    usage: Usage
    unknown_tokens: Usage


class Store:
    """Attempts and results in one SQLite file. Use `open_store`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    def attempts(self, key: str) -> list[Attempt]:
        """The finished attempts of a request, oldest first."""
        rows = self._db.execute(
            "SELECT ending, status, detail, finish_reason, text, prompt_tokens, cached_tokens, completion_tokens"
            " FROM attempts WHERE key = ? AND ending IS NOT NULL ORDER BY number",
            (key,),
        )
        return [
            Attempt(
                cast(Ending, ending),
                status,
                detail or "",
                finish_reason=finish_reason,
                text=text or "",
                usage=None if prompt is None else Usage(prompt, cached, completion),
            )
            for ending, status, detail, finish_reason, text, prompt, cached, completion in rows
        ]

    def begin(self, headings: Iterable[Heading], batch: str | None = None) -> list[int]:
        """Store attempts as open, with the mark of their batch, and return their numbers.

        Attempts without a batch are not synced to disk: they survive a kill of the process, but not a crash of the
        machine.
        """
        now = time.time()
        numbers = []
        with self._transaction(sync=batch is not None):
            for heading in headings:
                (number,) = self._db.execute(
                    "SELECT coalesce(max(number), 0) + 1 FROM attempts WHERE key = ?", (heading.key,)
                ).fetchone()
                self._db.execute(
                    "INSERT INTO attempts (key, number, stage, model, item, round, prompt_hash, batch, most_prompt,"
                    " most_completion, started) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        heading.key,
                        number,
                        heading.stage,
                        heading.model,
                        heading.item,
                        heading.round,
                        heading.prompt_hash,
                        batch,
                        heading.most.prompt,
                        heading.most.completion,
                        now,
                    ),
                )
                numbers.append(number)
        return numbers

    def finish(self, ends: Iterable[tuple[str, int, Attempt]]) -> None:
        """Commit how attempts (key, number) ended, and sync to disk."""
        now = time.time()
        with self._transaction(sync=True):
            for key, number, attempt in ends:
                usage = attempt.usage
                self._db.execute(
                    "UPDATE attempts SET ending = ?, status = ?, detail = ?, finish_reason = ?, text = ?,"
                    " prompt_tokens = ?, cached_tokens = ?, completion_tokens = ?, seconds = ? - started"
                    " WHERE key = ? AND number = ?",
                    (
                        attempt.ending,
                        attempt.status,
                        attempt.detail,
                        attempt.finish_reason,
                        attempt.text,
                        None if usage is None else usage.prompt,
                        None if usage is None else usage.cached,
                        None if usage is None else usage.completion,
                        now,
                        key,
                        number,
                    ),
                )

    def open_attempts(self) -> int:
        """Number of attempts that have not ended: in flight now, or when an earlier process was killed."""
        return self._db.execute("SELECT count(*) FROM attempts WHERE ending IS NULL AND batch IS NULL").fetchone()[0]

    def close_lost(self) -> int:
        """Mark the open attempts of a killed process as `lost`, and return their number."""
        with self._transaction(sync=True):
            return self._db.execute(
                "UPDATE attempts SET ending = 'lost', detail = 'the process ended while it was in flight'"
                " WHERE ending IS NULL AND batch IS NULL"
            ).rowcount

    def deny_refused(self, model: str) -> None:
        """Mark refused requests as `denied`, so that they are sent again: their texts were not the reason."""
        with self._transaction(sync=False):
            self._db.execute("UPDATE attempts SET ending = 'denied' WHERE ending = 'refused' AND model = ?", (model,))

    def ledger(self) -> list[LedgerRow]:
        """Requests and usage by stage, model and whether the batch API was used."""
        unknown = ", ".join(f"'{ending}'" for ending in sorted(UNKNOWN_COST))
        unpriced = f"(ending IN ({unknown}) OR ending = 'reply' AND prompt_tokens IS NULL OR ending IS NULL)"
        rows = self._db.execute(
            "SELECT stage, model, batch IS NOT NULL AS batched, count(DISTINCT key), count(*), sum(ending = 'reply'),"
            f" sum(ending != 'reply'), sum({unpriced}), sum(ending = 'reply' AND prompt_tokens IS NULL),"
            " coalesce(sum(prompt_tokens), 0), coalesce(sum(cached_tokens), 0), coalesce(sum(completion_tokens), 0),"
            f" coalesce(sum(most_prompt * {unpriced}), 0), coalesce(sum(most_completion * {unpriced}), 0)"
            " FROM attempts GROUP BY stage, model, batched ORDER BY stage, model, batched"
        )
        return [
            LedgerRow(
                stage,
                model,
                bool(batched),
                requests,
                attempts,
                replies or 0,
                failed or 0,
                unpriced_count or 0,
                without_usage or 0,
                Usage(prompt, cached, completion),
                Usage(most_prompt, 0, most_completion),
            )
            for (
                stage,
                model,
                batched,
                requests,
                attempts,
                replies,
                failed,
                unpriced_count,
                without_usage,
                prompt,
                cached,
                completion,
                most_prompt,
                most_completion,
            ) in rows
        ]

    def result(self, key: str) -> str | None:
        """The value stored under a key, such as the outcome of a record, or None."""
        row = self._db.execute("SELECT value FROM results WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def keep_result(self, key: str, value: str) -> None:
        """Store a value that was computed from replies. Not synced: it can be computed again without requests."""
        with self._transaction(sync=False):
            self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, value))

    def batches(self, base_url: str) -> list[tuple[str, str | None]]:
        """The batches that are not done: mark, and the endpoint's id or None if it is not known yet."""
        rows = self._db.execute("SELECT mark, id FROM batches WHERE base_url = ? AND NOT done", (base_url,))
        return list(rows)

    def note_batch(self, mark: str, base_url: str, identity: str | None = None, done: bool = False) -> None:
        """Commit the state of a batch, and sync to disk."""
        with self._transaction(sync=True):
            self._db.execute(
                "INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", (mark, base_url, identity, int(done))
            )

    def batch_members(self, mark: str) -> dict[str, int]:
        """key -> attempt number of the requests of a batch without a result."""
        rows = self._db.execute("SELECT key, number FROM attempts WHERE batch = ? AND ending IS NULL", (mark,))
        return dict(rows)

    @contextmanager
    def _transaction(self, sync: bool) -> Iterator[None]:
        self._db.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


@contextmanager
def open_store(path: str | Path) -> Iterator[Store]:
    """Open or create the store at `path`, locked until the end of the `with` or of the process.

    Raises:
        BimedixError: another process has locked it, or the file is not a store of this version.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(place).open("a") as lock:
        _lock(lock, place)
        with _connected(place, place) as store:
            yield store


@contextmanager
def open_copy(path: str | Path) -> Iterator[Store]:
    """A temporary copy of the store at `path`, or an empty store if there is none; nothing is written at `path`.

    Raises:
        BimedixError: as `open_store`.
    """
    place = Path(path)
    if not place.is_file():
        with _connected(place, ":memory:") as store:
            yield store
        return
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as held:
        if _lock_file(place).is_file():
            _lock(held.enter_context(_lock_file(place).open()), place)
        for suffix in ("", "-wal"):  # the log has what a killed process has committed
            file = place.with_name(place.name + suffix)
            if file.is_file():
                shutil.copyfile(file, Path(scratch) / file.name)
        with _connected(place, Path(scratch) / place.name) as store:
            yield store


def _lock_file(place: Path) -> Path:
    return place.with_name(f"{place.name}.lock")


@contextmanager
def _connected(place: Path, file: str | Path) -> Iterator[Store]:
    """The store in the SQLite database `file`; messages name `place`."""
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        _prepare(connection, place)
        yield Store(place, connection)
    finally:
        connection.close()


def _lock(lock: IO[str], place: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BimedixError(
            f"another process uses {place}; wait for it, or name another store (two processes would pay twice)"
        ) from error


def _prepare(connection: sqlite3.Connection, place: Path) -> None:
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise BimedixError(
                f"{place} is a store of version {version} and this program reads version {VERSION}; name another file"
            )
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if foreign := sorted(tables - {"attempts", "batches", "results"}):
            raise BimedixError(
                f"{place} is another program's database (it has a table {foreign[0]}); name another file"
            )
        connection.executescript(_TABLES)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.DatabaseError as error:
        raise BimedixError(f"{place} is not a store of replies ({error}); name another file") from error
