"""A table as Markdown, LaTeX, CSV, and for a terminal or Weights & Biases, from one description."""

import csv
import dataclasses
import io
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
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "×": r"$\times$",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell: its text, its number if it has one, the footnote that it refers to, and whether the row is ours."""

    text: str
    value: float | None = None
    note: int | None = None
    ours: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table with footnotes, which are numbered from 1."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rows as numbers where cells have one, else as text."""
        rows = [
            {
                "ours": row[0].ours,
                **{
                    column: cell.text if cell.value is None else cell.value
                    for column, cell in zip(self.columns, row, strict=True)
                },
            }
            for row in self.rows
        ]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "notes": list(self.notes)}


def render(sheet: Sheet, form: str) -> str:
    """`sheet` in one of FORMATS."""
    return {"markdown": markdown, "latex": latex, "csv": as_csv}[form](sheet)


def markdown(sheet: Sheet) -> str:
    """A pipe table. Our rows are bold, and footnotes are numbered in brackets."""

    def shown(cell: Cell) -> str:
        text = cell.text.replace("|", r"\|")
        text = f"**{text}**" if cell.ours and text else text
        return f"{text} [{cell.note}]".strip() if cell.note else text

    head = ["| " + " | ".join(sheet.columns) + " |", "|" + "---|" * len(sheet.columns)]
    body = ["| " + " | ".join(map(shown, row)) + " |" for row in sheet.rows]
    notes = [f"{number}. {note}" for number, note in enumerate(sheet.notes, 1)]
    return "\n".join([f"**{sheet.title}**", "", *head, *body, "", *notes]).rstrip() + "\n"


def latex(sheet: Sheet) -> str:
    """A `table` for the package booktabs; a rule separates our rows."""

    def shown(cell: Cell) -> str:
        return escaped(cell.text) + (f"\\textsuperscript{{{cell.note}}}" if cell.note else "")

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
    """One line for each row: the texts, whether the row is ours, and the footnotes of the row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*sheet.columns, "ours", "notes"])
    for row in sheet.rows:
        numbers = sorted({cell.note for cell in row if cell.note})
        notes = " ".join(sheet.notes[number - 1] for number in numbers)
        writer.writerow([*(cell.text for cell in row), str(row[0].ours).lower(), notes])
    return out.getvalue()


def terminal(sheet: Sheet) -> FittedTable:
    """For a console."""
    notes = [f"{number} {note}" for number, note in enumerate(sheet.notes, 1)]
    table = FittedTable(title=sheet.title, caption="\n".join(notes) or None)
    table.add_column(sheet.columns[0])
    for column in sheet.columns[1:]:
        table.add_column(column, justify="right")
    for row in sheet.rows:
        table.add_row(*(cell.text + (f" [{cell.note}]" if cell.note else "") for cell in row))
    return table
