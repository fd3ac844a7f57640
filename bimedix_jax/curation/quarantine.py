"""What was left out, and why: nothing disappears between a data set's files and the records made of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from bimedix_jax.data.records import Record, explain
from bimedix_jax.errors import BimedixError

MAX_REASONS = 1000
"""Distinct reasons that are counted apart, so that a million broken rows cannot fill the memory."""

OTHER_REASONS = "other reasons"
REASON_LENGTH = 300
"""Characters of a reason that are kept: some repeat what a row says."""


class WrongSource(BimedixError):
    """What is wrong concerns the source as a whole and not the row it was met at: it ends the reading."""


class LimitReached(Exception):
    """Raised by `Quarantine.build` for the first row past the limit; `readers.read` ends there."""


@dataclass(frozen=True)
class Rejected:
    """A row that became no record. `line` counts from 1; in a file without lines (JSON, XML) it counts the entries."""

    source: str
    file: str
    line: int | None  # None where a record that could be read was left out for what it says
    reason: str
    detail: str = ""


def left_out(source: str, record: str, reason: str, detail: str) -> Rejected:
    """A record that was read and is not wanted: its id stands where others have their file."""
    return Rejected(source, record, None, reason, detail)


@dataclass
class Quarantine:
    """Rows that were rejected, and how many were read: what a reader reports besides its records.

    Attributes:
      rejected: the rejected rows, unless `sink` takes them.
      read: rows read by source, those of other shards not among them.
      shard: (i, n) makes records of the rows whose number within their source is i modulo n, and of no other.
      limit: rows taken of each source.
      sink: called with each rejected row, instead of keeping it.
      row: number, from 0 within its source, of the row that was built last: of the record a reader has just yielded.
      count: rows rejected so far.
    """

    rejected: list[Rejected] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    shard: tuple[int, int] = (0, 1)
    limit: int | None = None
    sink: Callable[[Rejected], None] | None = None
    row: int = -1
    count: int = 0
    _reasons: Counter[tuple[str, str]] = field(default_factory=Counter)

    def start(self) -> None:
        """Count rows from 0 again: a source begins."""
        self.row = -1

    def build(
        self, source: str, file: str | Path, line: int, make: Callable[..., Record], *parts: object
    ) -> Record | None:
        """`make(*parts)`, or None after noting why the row cannot be a record; None for rows of other shards.

        Raises:
            WrongSource: `make` found that the source is not what its reader takes.
            LimitReached: `limit` rows have been built.
        """
        self.row += 1
        if self.limit is not None and self.row >= self.limit:
            raise LimitReached
        if self.row % self.shard[1] != self.shard[0]:
            return None
        self.read[source] += 1
        try:
            return make(*parts)
        except WrongSource:
            raise
        except ValidationError as error:
            reason = explain(error)
        except KeyError as error:
            reason = f"field {error} is missing"
        except (ValueError, TypeError, AttributeError, IndexError, BimedixError) as error:
            reason = str(error)
        self.add(source, file, line, reason)
        return None

    def add(self, source: str, file: str | Path, line: int, reason: str) -> None:
        """Note one rejected row."""
        self.note(Rejected(source, file.name if isinstance(file, Path) else file, line, reason[:REASON_LENGTH]))

    def leave_out(self, record: Record, reason: str, detail: str) -> None:
        """Note a record that was read and is well formed, and is not wanted."""
        self.note(left_out(record.source, record.id, reason, detail))

    def reasons(self) -> Counter[tuple[str, str]]:
        """How many rows each (source, reason) took."""
        return self._reasons

    def note(self, row: Rejected) -> None:
        """Note a row that is rejected already."""
        self.count += 1
        key = (row.source, row.reason)
        if key not in self._reasons and len(self._reasons) >= MAX_REASONS:
            key = (row.source, OTHER_REASONS)
        self._reasons[key] += 1
        if self.sink is None:
            self.rejected.append(row)
        else:
            self.sink(row)
