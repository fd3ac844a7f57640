"""A table as Markdown, LaTeX, CSV, and for a terminal or Weights & Biases, from one description."""

import csv
import dataclasses
import io
import itertools
from typing import Any

from bimedix_jax.process.terminal import FittedTable

FORMATS = {"markdown": ".md", "latex": ".tex", "csv": ".csv"}
"""Format -> suffix of its file."""
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "≥": r"$\geq$",
    "×": r"$\times$",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell: its text, its number if it has one, the footnote that it refers to, whether the row is ours, and the ends
    of its interval if it has one."""

    text: str
    value: float | None = None
    note: int | None = None
    ours: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def shown(self) -> str:
        """The text with the interval."""
        return self.text if self.low is None else f"{self.text} [{self.low:.1f}, {self.high:.1f}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table with footnotes, which are numbered from 1."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rows as numbers where cells have one, else as text; intervals as further fields, "MedQA low"."""
        rows = []
        for row in self.rows:
            fields: dict[str, Any] = {"ours": row[0].ours}
            for column, cell in zip(self.columns, row, strict=True):
                fields[column] = cell.text if cell.value is None else cell.value
                if cell.low is not None:
                    fields |= {f"{column} low": cell.low, f"{column} high": cell.high}
            rows.append(fields)
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "notes": list(self.notes)}


def render(sheet: Sheet, form: str) -> str:
    """`sheet` in one of FORMATS."""
    return {"markdown": markdown, "latex": latex, "csv": as_csv}[form](sheet)


def markdown(sheet: Sheet) -> str:
    """A pipe table. Our rows are bold, and footnotes are numbered in brackets."""

    def shown(cell: Cell) -> str:
        text = cell.shown.replace("|", r"\|")
        text = f"**{text}**" if cell.ours and text else text
        return f"{text} [{cell.note}]".strip() if cell.note else text

    head = ["| " + " | ".join(sheet.columns) + " |", "|" + "---|" * len(sheet.columns)]
    body = ["| " + " | ".join(map(shown, row)) + " |" for row in sheet.rows]
    notes = [f"{number}. {note}" for number, note in enumerate(sheet.notes, 1)]
    return "\n".join([f"**{sheet.title}**", "", *head, *body, "", *notes]).rstrip() + "\n"


def latex(sheet: Sheet) -> str:
    """A `table` for the package booktabs; a rule separates our rows."""

    def shown(cell: Cell) -> str:
        return escaped(cell.shown) + (f"\\textsuperscript{{{cell.note}}}" if cell.note else "")

    lines = []
    for number, row in enumerate(sheet.rows):
        if row[0].ours and number and not sheet.rows[number - 1][0].ours:
            lines.append(r"\midrule")
        lines.append(" & ".join(map(shown, row)) + r" \\")
    notes = [f"\\textsuperscript{{{number}}} {escaped(note)}\\\\" for number, note in enumerate(sheet.notes, 1)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(sheet.title)}}}",
            rf"\label{{tab:{sheet.name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}",
            r"\toprule",
            " & ".join(map(escaped, sheet.columns)) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\smallskip\footnotesize\raggedright",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text without characters that are special in LaTeX."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def as_csv(sheet: Sheet) -> str:
    """One line for each row: the texts, the ends of intervals in columns of their own, whether the row is ours, and its
    footnotes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    wide = [any(row[place].low is not None for row in sheet.rows) for place in range(len(sheet.columns))]
    heads = [
        [name, f"{name} low", f"{name} high"][: 3 if ends else 1]
        for name, ends in zip(sheet.columns, wide, strict=True)
    ]
    writer.writerow([*itertools.chain.from_iterable(heads), "ours", "notes"])
    for row in sheet.rows:
        values = [
            [cell.text, *("" if end is None else f"{end:.1f}" for end in (cell.low, cell.high))][: 3 if ends else 1]
            for cell, ends in zip(row, wide, strict=True)
        ]
        numbers = sorted({cell.note for cell in row if cell.note})
        notes = " ".join(sheet.notes[number - 1] for number in numbers)
        writer.writerow([*itertools.chain.from_iterable(values), str(row[0].ours).lower(), notes])
    return out.getvalue()


def terminal(sheet: Sheet) -> FittedTable:
    """For a console."""
    notes = [f"[{number}] {note}" for number, note in enumerate(sheet.notes, 1)]
    table = FittedTable(title=sheet.title, caption="\n".join(notes) or None)
    table.add_column(sheet.columns[0])
    for column in sheet.columns[1:]:
        table.add_column(column, justify="right")
    for row in sheet.rows:
        table.add_row(*(cell.shown + (f" [{cell.note}]" if cell.note else "") for cell in row))
    return table
