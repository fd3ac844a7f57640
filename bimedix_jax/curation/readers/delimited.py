"""Rows of CSV, TSV and other delimited text, one at a time. No line is lost: a stray quotation mark costs its own line.

A field that begins with a quotation mark may span lines. Where such a mark is text, the standard reader takes all up to
the next one as a single field, and rows vanish inside it. So a file that has fields over several lines, or rows that do
not fit, is read once with quotation marks and once without. The reading with more lines in sound rows is used.
"""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TextIO

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.errors import BimedixError

MAX_SPAN = 2000
"""Most lines of one field; a mark that is not closed within them is text."""

OTHERS = (";", "\t", "|", ",", "،")
"""Delimiters that are tried if the header has one column under the usual one."""

_EXCEL_SEPARATOR = re.compile(r"\ufeff?\"?sep=(.)\"?\s*")

Opener = Callable[[], AbstractContextManager[TextIO]]


@dataclass(frozen=True)
class Dialect:
    """How a file is delimited: whether quotation marks enclose fields, and whether spaces follow the delimiters."""

    delimiter: str
    quoted: bool = True
    spaced: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Parsed:
    """The fields of a row or why there are none, the number of its last line, and how many lines it spans."""

    values: list[str] | Exception
    line: int
    lines: int


class _Feed:
    """Lines for csv.reader: those of the row that is being read can be taken back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._back: deque[str] = deque()
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        if len(self.taken) >= MAX_SPAN:
            raise csv.Error(f"a field spans more than {MAX_SPAN} lines")
        line = self._back.popleft() if self._back else next(self._lines)
        self.taken.append(line)
        self.number += 1
        return line

    def take_back(self) -> None:
        """Give back all lines of the row but its first."""
        self._back.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def parsed(lines: Iterator[str], dialect: Dialect, width: int | None = None) -> Iterator[Parsed]:
    """The rows of a text. A row over several lines must have as many columns as the first row that is not blank."""
    feed = _Feed(lines)

    def reader() -> Iterator[list[str]]:
        quoting = csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE
        return csv.reader(
            feed,
            delimiter=dialect.delimiter,
            quoting=quoting,
            skipinitialspace=dialect.spaced,
            strict=dialect.strict and dialect.quoted,
        )

    rows = reader()
    while True:
        feed.taken = []
        values: list[str] | Exception
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            values = ValueError(str(error))
        wrong = isinstance(values, Exception) or (width is not None and len(values) != width)
        if wrong and len(feed.taken) > 1 and not _closes(feed.taken, dialect):
            feed.take_back()
            yield Parsed(ValueError("a quotation mark opens a field and does not close it"), feed.number, 1)
            rows = reader()
            continue
        if isinstance(values, list) and values:
            width = width or len(values)
            if not dialect.quoted:
                values = [_unquoted(value) for value in values]
        yield Parsed(values, feed.number, len(feed.taken))


def _closes(lines: list[str], dialect: Dialect) -> bool:
    """Whether the lines are one row whose quotation marks enclose whole fields, so that only their number is wrong."""
    strict = csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=dialect.spaced, strict=True)
    try:
        return len(list(strict)) == 1
    except csv.Error:
        return False


def _unquoted(value: str) -> str:
    """A field without the marks that enclose all of it."""
    inner = value[1:-1]
    whole = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else value


def table_rows(
    opened: Opener, name: str, delimiter: str | None, header: bool, account: SourceAccount
) -> Iterator[tuple[Parsed, dict[str, str] | Exception]]:
    """Each row with its fields by the names of the columns, or by their numbers from "0" without `header`.

    Raises:
        BimedixError: two columns have the same name.
    """
    dialect, skip = _dialect(opened, name, delimiter, account)
    names: list[str] | None = None
    with opened() as text:
        for row in parsed(iter(text), dialect):
            account.lines += row.lines
            if skip:
                account.header += row.lines
                skip = False
            elif row.values == []:
                account.blank += row.lines
            elif not header and isinstance(row.values, list):
                yield row, {str(index): value for index, value in enumerate(row.values)}
            elif header and names is None and isinstance(row.values, list):
                names = [value.strip().strip("\ufeff").strip() for value in row.values]
                account.header += row.lines
                account.columns = account.columns or names
                _check_names(names, name)
            elif isinstance(row.values, Exception):
                yield row, row.values
            else:
                yield row, named(names or [], row.values)


def named(names: list[str], values: list[str]) -> dict[str, str] | ValueError:
    """The values by name; an error, to be raised for the row, if there are more or fewer."""
    if len(names) != len(values):
        return ValueError(f"{len(values)} columns, the header has {len(names)}")
    return dict(zip(names, values, strict=True))


def _check_names(names: list[str], name: str) -> None:
    twice = sorted({column for column in names if names.count(column) > 1})
    if twice:
        raise BimedixError(
            f"{name} has two columns with the same name ({', '.join(map(repr, twice))}); rename one. If the "
            "file has no header, pass header=no and name the columns by their numbers from 0"
        )


def _dialect(opened: Opener, name: str, delimiter: str | None, account: SourceAccount) -> tuple[Dialect, bool]:
    """How the file is delimited, and whether its first line only names the delimiter, as Excel writes it."""
    usual = "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with opened() as text:
        first = next((line for line in text if line.strip()), "")
        stated = _EXCEL_SEPARATOR.fullmatch(first)
        if stated:
            first = next((line for line in text if line.strip()), "")
    found = delimiter or (stated[1] if stated else _delimiter(first, usual))
    if found != (delimiter or usual):
        account.note(f"columns: separated by {found!r} in {name}; delimiter= decides otherwise")
    columns = _columns(first, found)
    dialect = Dialect(found, spaced=len(columns) > 1 and all(column.startswith(" ") for column in columns[1:]))
    if not _marks_enclose(opened, dialect):
        dialect = Dialect(found, quoted=False, spaced=dialect.spaced)
        account.note(f"quotation marks: part of the text in {name}, since they do not enclose whole fields")
    return dialect, stated is not None


def _delimiter(first: str, usual: str) -> str:
    if len(_columns(first, usual)) > 1:
        return usual
    counts = {other: len(_columns(first, other)) for other in OTHERS}
    best = max(counts, key=lambda other: counts[other])
    return best if counts[best] > 1 else usual


def _columns(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _marks_enclose(opened: Opener, dialect: Dialect) -> bool:
    """Whether quotation marks enclose fields: whether more lines are in rows of the right width if they do."""
    with opened() as text:
        sound, wrong, spans = _sound_lines(iter(text), Dialect(dialect.delimiter, True, dialect.spaced, strict=True))
    if not wrong and not spans:
        return True
    with opened() as text:
        plain, _, _ = _sound_lines(iter(text), Dialect(dialect.delimiter, False, dialect.spaced))
    # a field over several lines, each with as many tabs as the header, is rarer than a stray mark in tab-separated text
    return sound > plain if spans and dialect.delimiter == "\t" else sound >= plain


def _sound_lines(lines: Iterator[str], dialect: Dialect) -> tuple[int, int, int]:
    """Lines in rows as wide as the first or over several lines, lines in other rows, and rows over several lines."""
    width: int | None = None
    sound = wrong = spans = 0
    for row in parsed(lines, dialect):
        if row.values == []:
            continue
        if isinstance(row.values, list) and width is None:
            width = len(row.values)
        if isinstance(row.values, list) and (len(row.values) == width or row.lines > 1):
            sound += row.lines
            spans += row.lines > 1
        else:
            wrong += row.lines
    return sound, wrong, spans
