"""What was left out, and why: nothing disappears between a data set's files and the records made of them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from bimedix_jax.data.records import Record, explain
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Rejected:
    """A row that became no record. `line` counts from 1; in a JSON file that is one object it counts the entries."""

    source: str
    file: str
    line: int | None  # None where a record that could be read was left out for what it says
    reason: str
    detail: str = ""


@dataclass
class Quarantine:
    """Rows that were rejected, and how many were read: what a reader reports besides its records."""

    rejected: list[Rejected] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)

    def build(self, source: str, file: Path, line: int, make: Callable[..., Record], *parts: object) -> Record | None:
        """`make(*parts)`, or None after noting why the row cannot be a record."""
        self.read[source] += 1
        try:
            return make(*parts)
        except ValidationError as error:
            reason = explain(error)
        except KeyError as error:
            reason = f"field {error} is missing"
        except (ValueError, TypeError, AttributeError, BimedixError) as error:
            reason = str(error)
        self.add(source, file, line, reason)
        return None

    def add(self, source: str, file: Path, line: int, reason: str) -> None:
        """Note one rejected row."""
        self.rejected.append(Rejected(source, file.name, line, reason))

    def leave_out(self, record: Record, reason: str, detail: str) -> None:
        """Note a record that was read and is well formed, and is not wanted."""
        self.rejected.append(Rejected(record.source, record.id, None, reason, detail))

    def reasons(self) -> Counter[tuple[str, str]]:
        """How many rows each (source, reason) took."""
        return Counter((row.source, row.reason) for row in self.rejected)
