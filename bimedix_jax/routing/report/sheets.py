"""The CSV files of a report, and HTML that shows their cells.

Every number and every name on the page comes from a cell of a CSV file. The element that shows it says which, so that a
reader or a program can look it up:

    <span data-at="cells.csv 4 estimate" data-scale="100">+1.2</span>

is row 4 (counted from 0, without the header) of the column `estimate` in cells.csv, times 100.
"""

import csv
import dataclasses
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bimedix_jax.bidi import is_right_to_left

NOT_TESTED = "not tested"
"""What stands for a value that was not recorded or cannot be computed."""
SETTINGS, AXES = "settings.csv", "axes.csv"


@dataclasses.dataclass(eq=False)
class Sheet:
    """A CSV file. Values are str, int, float, bool or None, which is an empty cell."""

    name: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = dataclasses.field(default_factory=list)

    def add(self, *values: Any) -> int:
        """Appends a row and returns its index."""
        assert len(values) == len(self.columns), self.name
        self.rows.append(values)
        return len(self.rows) - 1

    def value(self, row: int, column: str) -> Any:
        return self.rows[row][self.columns.index(column)]

    def where(self, **values: Any) -> list[int]:
        """The indices of the rows that have these values."""
        places = {self.columns.index(name): value for name, value in values.items()}
        return [index for index, row in enumerate(self.rows) if all(row[at] == x for at, x in places.items())]

    def to_csv(self) -> str:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_stored(value) for value in row] for row in self.rows)
        return text.getvalue()


@dataclasses.dataclass(frozen=True)
class Shown:
    """How a cell is shown on the page.

    Attributes:
      at: file, row and column. text: what the reader sees. scale: the shown number is the stored one times this.
    """

    at: str
    text: str
    scale: float = 1.0

    def __bool__(self) -> bool:
        return self.text != NOT_TESTED

    @property
    def marks(self) -> str:
        """The attributes that say where the text comes from."""
        scale = "" if self.scale == 1 else f' data-scale="{self.scale:g}"'
        return f'data-at="{html.escape(self.at, quote=True)}"{scale}'

    def __str__(self) -> str:
        """As HTML, from right to left where the text begins in Arabic."""
        if is_right_to_left(self.text):
            return f'<bdi {self.marks} lang="ar" dir="rtl">{html.escape(self.text)}</bdi>'
        return f"<span {self.marks}>{html.escape(self.text)}</span>"


def number(sheet: Sheet, row: int, column: str, form: str = ".3g", scale: float = 1.0) -> Shown:
    """A number of a sheet by a format of Python; `not tested` where there is none."""
    value = sheet.value(row, column)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Shown(_at(sheet, row, column), NOT_TESTED)
    return Shown(_at(sheet, row, column), format(value if scale == 1 else scale * value, form), scale)


def words(sheet: Sheet, row: int, column: str) -> Shown:
    """A text of a sheet."""
    value = sheet.value(row, column)
    return Shown(_at(sheet, row, column), NOT_TESTED if value is None else _stored(value))


def points(sheet: Sheet, row: int, column: str) -> Shown:
    """A share as percentage points."""
    return number(sheet, row, column, "+.1f", 100.0)


def interval(sheet: Sheet, row: int, columns: Sequence[str], form: str = ".3g", scale: float = 1.0) -> str:
    """HTML of an estimate with the ends of its interval, `columns` in this order."""
    estimate, low, high = (number(sheet, row, column, form, scale) for column in columns)
    if not estimate:
        return str(estimate)
    return f"{estimate} ({low} to {high})" if low and high else f"{estimate} (no interval)"


@dataclasses.dataclass(eq=False)
class Settings:
    """The numbers and names that are true of the whole report, as a sheet of names and values."""

    sheet: Sheet = dataclasses.field(default_factory=lambda: Sheet(SETTINGS, ("name", "value")))

    def update(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.sheet.add(name, value)

    def shown(self, name: str, form: str | None = None, scale: float = 1.0) -> Shown:
        row = self.sheet.where(name=name)[0]
        return words(self.sheet, row, "value") if form is None else number(self.sheet, row, "value", form, scale=scale)

    def __iter__(self) -> Iterator[tuple[str, Shown]]:
        for row in range(len(self.sheet.rows)):
            yield self.sheet.value(row, "name"), words(self.sheet, row, "value")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], prose: bool = False) -> str:
    """An HTML table; cells are HTML. The first column is text, and so are all with `prose`."""
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="prose"' if prose else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _at(sheet: Sheet, row: int, column: str) -> str:
    return f"{sheet.name} {row} {column}"


def _stored(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
