"""Rows that were left out, each with its reason, so that no row of a data set disappears silently."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.data.records import Record, explain
from bimedix_jax.errors import BimedixError

MAX_REASONS = 1000
"""Most distinct reasons that are counted separately; bounds the memory that a million broken rows take."""

OTHER_REASONS = "other reasons"
REASON_LENGTH = 300
"""Most characters of a reason and of a detail that are kept."""

# values that an error quotes: texts, lists and objects, and numbers of more than two digits
_VALUE = re.compile(
    r"(?<!field )(?<!column )(?<!key )(?<!from )(?<!but )(?<![\w'])"  # these words come before names
    r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")(?!\w)"
    r"|\{.*\}|\[.*\]|(?<![\w.])\d{3,}(?![\w.])",
    re.DOTALL,
)


class WrongSource(BimedixError):
    """The source as a whole is wrong, not only the row at which this was found. Reading stops."""


class LimitReached(Exception):
    """Raised by `Quarantine.build` for the first row past the limit; `readers.read` stops there."""


@dataclass(frozen=True)
class Rejected:
    """A row that did not become a record. `line` counts from 1; in JSON and XML it counts entries."""

    source: str
    file: str
    line: int | None  # None for a valid record that was left out
    reason: str
    detail: str = ""


def left_out(source: str, record: str, reason: str, detail: str) -> Rejected:
    """The rejection of a valid record; `file` is its id."""
    return Rejected(source, record, None, reason, detail)


def reason_of(error: Exception) -> tuple[str, str]:
    """(the kind of an error, without text of the row, so that equal errors are counted together; the error in full)."""
    if isinstance(error, ValidationError):
        return explain(error), ""
    if isinstance(error, KeyError):
        return f"field {error} is missing", ""
    if isinstance(error, json.JSONDecodeError):
        return f"the row is not valid JSON ({error.msg})", str(error)
    if isinstance(error, UnicodeError):
        return "a text is not valid UTF-8; pass encoding= if the whole file has another encoding", str(error)
    reason = _VALUE.sub("…", str(error))
    return reason, "" if reason == str(error) else str(error)


@dataclass
class Quarantine:
    """Rows that were rejected, and how many were read. Readers fill it while they yield records.

    Attributes:
      rejected: the rejected rows, if there is no `sink`.
      read: number of rows read, by source.
      limit: maximum number of rows to read from each source.
      sink: called with each rejected row, which is then not kept in `rejected`.
      row: number of the row that was built last, counted from 0 within its source.
      count: rows rejected so far.
      account: where the lines of the current source went; `start` begins a new one.
    """

    rejected: list[Rejected] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    limit: int | None = None
    sink: Callable[[Rejected], None] | None = None
    row: int = -1
    count: int = 0
    account: SourceAccount = field(default_factory=SourceAccount)
    _reasons: Counter[tuple[str, str]] = field(default_factory=Counter)

    def start(self) -> None:
        """Begin a new source: count its rows from 0."""
        self.row = -1
        self.account = SourceAccount()

    def build(
        self, source: str, file: str | Path, line: int, make: Callable[..., Record], *parts: object
    ) -> Record | None:
        """Return `make(*parts)`, or None if the row cannot become a record; then note the reason.

        Raises:
            WrongSource: `make` found that its reader cannot read this source.
            LimitReached: `limit` rows have been built.
        """
        self.row += 1
        if self.limit is not None and self.row >= self.limit:
            raise LimitReached
        self.read[source] += 1
        try:
            return make(*parts)
        except WrongSource:
            raise
        except (ValueError, TypeError, AttributeError, LookupError, BimedixError) as error:
            self.add(source, file, line, *reason_of(error))
        return None

    def add(self, source: str, file: str | Path, line: int, reason: str, detail: str = "") -> None:
        """Note one rejected row. `reason` is a kind of error, `detail` what it is in this row."""
        name = file.name if isinstance(file, Path) else file
        self.note(Rejected(source, name, line, reason[:REASON_LENGTH], detail[:REASON_LENGTH]))

    def leave_out(self, record: Record, reason: str, detail: str) -> None:
        """Note a valid record that is left out."""
        self.note(left_out(record.source, record.id, reason, detail))

    def reasons(self) -> Counter[tuple[str, str]]:
        """Number of rejected rows by (source, reason)."""
        return self._reasons

    def note(self, row: Rejected) -> None:
        """Note a `Rejected` row."""
        self.count += 1
        key = (row.source, row.reason)
        if key not in self._reasons and len(self._reasons) >= MAX_REASONS:
            key = (row.source, OTHER_REASONS)
        self._reasons[key] += 1
        if self.sink is None:
            self.rejected.append(row)
        else:
            self.sink(row)
