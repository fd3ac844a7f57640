"""Where the lines of a source went, and what was decided about the source as a whole.

Readers fill a `SourceAccount` while they read. Every line that was read is a header, blank, skipped by an option, or
part of a row; every row is a record or left out. `check` asserts this once the source is read to its end.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bimedix_jax.data.records import Split
from bimedix_jax.errors import BimedixError

MAX_PROBLEMS = 50
MAX_COLUMNS = 30
"""Most columns or keys that an error message lists."""


@dataclass
class SourceAccount:
    """Counts and decisions of one source.

    Attributes:
      lines: lines of text files, rows of sheets, or entries of JSON, XML and Parquet that were read.
      header, blank, skipped: lines that hold no row, and rows that an option of the reader leaves out.
      continued: further lines of rows that span several lines.
      rows: rows that were built, each of which became a record or was left out.
      records: records that were made.
      removed: records that were left out afterwards, as a duplicate or a record of an evaluation set.
      languages: records by language, where the script decided it.
      splits: the split that the name of a file implies, by file; None if the name is ambiguous.
      changes: texts by what was changed in them, such as removed HTML.
      notes: sentences about the whole source, such as how a column was read.
      columns: the columns or keys of the first row.
      problems: rows that were left out, by reason, for at most MAX_PROBLEMS reasons.
    """

    lines: int = 0
    header: int = 0
    blank: int = 0
    skipped: int = 0
    continued: int = 0
    rows: int = 0
    records: int = 0
    removed: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    splits: dict[str, Split | None] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)

    def note(self, sentence: str) -> None:
        """Add a sentence, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def saw(self, columns: Iterable[object]) -> None:
        """Keep the columns of the first row."""
        if not self.columns:
            self.columns = [str(column) for column in columns]

    def failed(self, reason: str) -> None:
        """Count a row that was left out."""
        if reason in self.problems or len(self.problems) < MAX_PROBLEMS:
            self.problems[reason] += 1

    def built(self, lines: int, made: bool) -> None:
        """Count a row that spans `lines` lines."""
        self.rows += 1
        self.records += made
        self.continued += lines - 1

    def check(self, source: str) -> None:
        """Raise BimedixError if lines were read that are in no other count."""
        found = self.header + self.blank + self.skipped + self.continued + self.rows
        if found != self.lines:
            raise BimedixError(
                f"{self.lines:,} lines of {source} were read, but {found:,} are accounted for; this is an error of the "
                "reader, so report it with the file"
            )

    @property
    def left_out(self) -> int:
        """Rows that became no record, and records that were left out afterwards."""
        return self.rows - self.records + self.removed

    def sentences(self) -> list[str]:
        """What a person should know about the source: counts of lines, decisions and changes."""
        parts = [f"{self.records - self.removed:,} records", f"{self.left_out:,} left out"]
        for name in ("header", "blank", "skipped", "continued"):
            if getattr(self, name):
                parts.append(f"{getattr(self, name):,} {name}")
        found = [f"{self.lines:,} lines = {' + '.join(parts)}", *self.notes]
        for split in sorted({str(split) for split in self.splits.values()}):
            names = sorted(name for name, value in self.splits.items() if str(value) == split)
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            meant = "says both train and held out, so records are split by hash" if split == "None" else f"says {split}"
            found.append(f"split: the name {listed} {meant}; split= decides otherwise")
        if self.languages:
            counts = ", ".join(f"{number:,} {name}" for name, number in sorted(self.languages.items()))
            found.append(f"language by script: {counts}; language= states it")
        found += [f"{what}: {number:,}" for what, number in sorted(self.changes.items())]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The counts and sentences for a report."""
        names = ("lines", "header", "blank", "skipped", "continued", "rows")
        counts = {name: getattr(self, name) for name in names}
        counts |= {"records": self.records - self.removed, "left_out": self.left_out}
        return {"account": counts, "notes": self.sentences()}

    def listed_problems(self) -> str:
        """The most frequent reasons for an error message."""
        return "; ".join(f"{number:,} rows: {reason}" for reason, number in self.problems.most_common(3))

    def listed_columns(self) -> str:
        """The columns of the first row for an error message."""
        more = "" if len(self.columns) <= MAX_COLUMNS else f" and {len(self.columns) - MAX_COLUMNS} more"
        return ", ".join(repr(column[:60]) for column in self.columns[:MAX_COLUMNS]) + more
