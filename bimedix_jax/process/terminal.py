"""What the commands print: no number and no name is cut, whatever the width of the terminal.

A table that does not fit becomes a block of lines for each row. Lines are wrapped between words only. Without a
terminal (a pipe, a file) or with NO_COLOR the text is plain.
"""

import copy
import os
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNLIMITED = 100_000
"""Columns of a terminal so wide that every table has its natural width."""

FOREIGN_TAG = re.compile(r"(\\*)\[(?!(?:/|/?bold|dim|(?:bold )?(?:yellow|red|green))\])(?=[a-z#/@][^\[]*?\])")
"""What rich would read as a tag, and is not one of those that our own messages use."""


class Screen(Console):
    """A console that never cuts a word, and that prints brackets in the names of files as they are."""

    def __init__(self, stderr: bool = False):
        # rich omits only colours for NO_COLOR, and keeps bold and underlined text
        color_system = None if os.environ.get("NO_COLOR") else "auto"
        super().__init__(stderr=stderr, color_system=color_system, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        if len(objects) == 1 and isinstance(objects[0], str | Text) and not {"soft_wrap", "justify"} & options.keys():
            names = {"markup", "highlight", "emoji"}
            shown = objects[0]
            if isinstance(shown, str):
                shown = self.render_str(shown, **{name: options[name] for name in names & options.keys()})
            lines = wrapped(shown, self.width)
            objects, options = (Text("\n").join(lines),), {"no_wrap": True, "overflow": "ignore", **options}
        super().print(*objects, **{"crop": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """`text` with our markup; any other bracket is kept, such as those in the name of a folder."""
        if options.get("markup") is not False:
            text = FOREIGN_TAG.sub(r"\1\1\\[", text)
        return super().render_str(text, **options)


def number(count: int, what: str) -> str:
    """A count with its noun: 1 record, 1,234 records."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def wrapped(text: Text, width: int) -> list[Text]:
    """The lines of `text`, broken between words only; a word that is wider than a line keeps a line for itself."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        breaks, start = [], 0
        for word in re.finditer(r"\S+", line.plain):
            if Text(line.plain[start : word.end()]).cell_len > width and line.plain[start : word.start()].strip():
                breaks.append(word.start())
                start = word.start()
        parts = list(line.divide(breaks)) if breaks else [line]
        for part in parts[:-1]:
            part.rstrip()
        lines += parts
    return lines


class FittedTable(Table):
    """A table that becomes blocks, with a line for each value, where the terminal is too narrow for its columns.

    Columns of prose wrap between words; headers too, where that is enough to fit.
    """

    def __init__(self, *headers: str, **options: Any):
        self.prose: set[int] = set()
        super().__init__(*headers, **options)

    def add_prose_column(self, header: str, justify: JustifyMethod = "left") -> None:
        """Add a column of text that may be broken between words."""
        self.prose.add(len(self.columns))
        self.add_column(header, justify=justify)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title, caption = self._lines(console, options, self.title), self._lines(console, options, self.caption)
        yield from title
        for separator in (" ", "\n"):
            form = self._without_wrapping(console, separator)
            natural = Table.__rich_measure__(form, console, options.update(max_width=UNLIMITED))
            if natural.minimum <= options.max_width:
                yield from Table.__rich_console__(form, console, options)
                break
        else:
            yield from self._blocks(console, options)
        yield from caption

    def _without_wrapping(self, console: Console, separator: str) -> "FittedTable":
        """A copy without title, with unbreakable cells; `separator` replaces the blanks in headers."""
        form = copy.copy(self)
        form.title = form.caption = None
        form.columns = []
        for place, column in enumerate(self.columns):
            header = Text(separator).join(text_of(console, column.header).split(" "))
            column = copy.copy(column)
            column.header = header
            if place not in self.prose:
                shown = [header, *(text_of(console, cell) for cell in column.cells)]
                column.no_wrap, column.min_width = True, max(map(width_of, shown))
            form.columns.append(column)
        return form

    def _lines(self, console: Console, options: ConsoleOptions, text: Any) -> Iterable[Text]:
        if text is None:
            return
        for line in wrapped(text_of(console, text), options.max_width):
            yield unbroken(line)

    def _blocks(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        headers = [text_of(console, column.header).plain for column in self.columns]
        cells = [[text_of(console, cell).plain for cell in column.cells] for column in self.columns]
        label = max(map(len, headers[1:]), default=0)
        for row in zip(*cells, strict=True):
            yield unbroken(Text(f"{headers[0]} {row[0]}".strip(), style="bold"))
            for header, value in zip(headers[1:], row[1:], strict=True):
                if value:
                    lines = wrapped(Text(value), max(options.max_width - label - 4, 20))
                    for place, line in enumerate(lines):
                        yield unbroken(Text(f"  {header if place == 0 else '':<{label}}  {line.plain}"))


def text_of(console: Console, shown: RenderableType) -> Text:
    """A cell, header or title, with its markup read."""
    return shown if isinstance(shown, Text) else console.render_str(str(shown), highlight=False)


def width_of(text: Text) -> int:
    """Columns of the widest line."""
    return max(line.cell_len for line in text.split("\n", allow_blank=True))


def unbroken(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ignore"
    return line
