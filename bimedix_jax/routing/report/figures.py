"""Figures as inline SVG, for screen and print.

Blue and orange differ for every kind of colour vision, and what a colour says is also written or outlined. The texts of
a figure are cells of CSV files (sheets.Shown), and so are the ticks of its axes (axes.csv).
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

from bimedix_jax.bidi import is_right_to_left
from bimedix_jax.routing.report.sheets import AXES, Sheet, Shown, number

BLUE, ORANGE, INK, FAINT = (33, 102, 172), (179, 88, 6), "#222", "#bbb"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito's."""
WRITTEN_EXPERTS = 16
"""A map of more experts has no numbers in its cells, but a key; they are in the CSV file."""


@dataclasses.dataclass(eq=False)
class Axes:
    """The ticks of all figures, as a sheet."""

    sheet: Sheet = dataclasses.field(default_factory=lambda: Sheet(AXES, ("figure", "tick", "value")))

    def scale(self, figure: int, low: float, high: float, start: float, end: float) -> "Scale":
        """A scale from `start` to `end` pixels that includes the values from `low` to `high`, with ticks."""
        ticks = nice_ticks(low, high)
        rows = [self.sheet.add(figure, place, tick) for place, tick in enumerate(ticks)]
        return Scale(ticks[0], ticks[-1], start, end, [number(self.sheet, row, "value", "g") for row in rows], ticks)


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    shown: list[Shown]
    ticks: list[float]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to nine, that enclose the values."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def svg(width: float, height: float, body: str, title: str) -> str:
    """A figure of this size; `title` is for readers who do not see it, and has no numbers."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{html.escape(title, quote=True)}">{body}</svg>'
    )


def text(x: float, y: float, shown: Shown | str, anchor: str = "start", colour: str = INK, css: str = "") -> str:
    """A text of a figure. `anchor` is of the left-to-right figure, also for Arabic."""
    marks, letters = (shown.marks, shown.text) if isinstance(shown, Shown) else ("", shown)
    direction = ""
    if is_right_to_left(letters):
        direction = ' direction="rtl" lang="ar"'
        anchor = {"start": "end", "end": "start"}.get(anchor, anchor)
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" class="{css}"{direction} {marks}>'
        f"{html.escape(letters)}</text>"
    )


def diverging(value: float, reach: float) -> tuple[str, str]:
    """The colours of a cell, blue below and orange above zero, and of the text on it."""
    share = min(abs(value) / reach, 1.0) if reach else 0.0
    full = ORANGE if value > 0 else BLUE
    mixed = [round(255 + share * (part - 255)) for part in full]
    linear = [((part / 255 + 0.055) / 1.055) ** 2.4 for part in mixed]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # at this luminance, black and white have the same contrast, 4.6 (WCAG asks for 4.5)
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})", "#fff" if luminance < 0.179 else "#000"


def sequential(value: float, reach: float) -> tuple[str, str]:
    """The colours of a cell from white to blue."""
    return diverging(-abs(value), reach)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapCell:
    """A cell of a map: its value, what is written in it, and whether it has an outline."""

    value: float
    shown: Shown | str
    outlined: bool = False


def layer_map(
    cells_LE: Sequence[Sequence[MapCell]],
    layers: Sequence[Shown],
    experts: Sequence[Shown],
    *,
    title: str,
    signed: bool,
    reach: float | None = None,
    key: Sequence[tuple[float, Shown | str]] = (),
) -> str:
    """A map of layers by experts.

    Args:
      reach: the value with the full colour, by default the largest magnitude.
      key: values with their names, to read the colours by where the cells have no numbers.
    """
    written = len(experts) <= WRITTEN_EXPERTS
    wide, tall = (44.0, 19.0) if written else (max(5.0, 720 / len(experts)), 13.0)
    left, top = 58.0, 34.0
    values = np.abs([[cell.value for cell in row] for row in cells_LE])
    reach = reach or float(np.nanmax(values, initial=0.0)) or 1.0
    colours = diverging if signed else sequential
    found = [text(left, 12, "expert"), text(left - 8, top - 6, "layer", "end")]
    every = 1 if written else max(1, len(experts) // 8)
    for place, shown in enumerate(experts):
        if place % every == 0:
            found.append(text(left + (place + 0.5) * wide, top - 6, shown, "middle"))
    outlines = []
    for row, (cells, shown) in enumerate(zip(cells_LE, layers, strict=True)):
        y = top + row * tall
        found.append(text(left - 8, y + tall * 0.72, shown, "end"))
        for place, cell in enumerate(cells):
            x = left + place * wide
            fill, ink = colours(cell.value, reach)
            found.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{fill}" class="cell"/>'
            )
            if written:
                found.append(text(x + wide / 2, y + tall * 0.72, cell.shown, "middle", ink))
            elif signed and cell.value < 0:
                found.append(f'<path d="M{x + wide / 4:.1f} {y + tall / 2:.1f}h{wide / 2:.1f}" stroke="{ink}"/>')
            if cell.outlined:
                outlines.append(
                    f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{tall - 2:.1f}" '
                    'class="claimed"/>'
                )
    width, height = left + len(experts) * wide + 10, top + len(layers) * tall + 8
    if not written:
        found.append(_key([(colours(value, reach)[0], shown) for value, shown in key], left, height))
        height += 22
    return svg(width, height, "".join(found + outlines), title)


def _key(colours: Sequence[tuple[str, Shown | str]], x: float, y: float) -> str:
    """Squares of these colours with their names, in a line."""
    found = []
    for fill, shown in colours:
        found.append(f'<rect x="{x:.1f}" y="{y + 2:.1f}" width="12" height="12" fill="{fill}" stroke="{INK}"/>')
        found.append(text(x + 17, y + 12, shown))
        x += 40 + 7 * len(shown.text if isinstance(shown, Shown) else shown)
    return "".join(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """An estimate with its interval: the values, and where they are stored."""

    value: float
    low: float | None
    high: float | None
    at: str
    scale: float = 1.0


def columns_plot(
    axes: Axes, figure: int, places: Sequence[Shown], series: Sequence[tuple[str, Sequence[Mark | None]]], title: str
) -> str:
    """Estimates with intervals: `places` from left to right, and at each the series side by side."""
    known = [mark for _, marks in series for mark in marks if mark is not None]
    ends = [x for mark in known for x in (mark.value, mark.low, mark.high) if x is not None]
    step = max(26.0, min(60.0, 700 / max(len(places), 1)))
    left, top, height = 62.0, 18.0 + 16 * len(series), 180.0
    scale = axes.scale(figure, min([0.0, *ends]), max([0.0, *ends]), top + height, top)
    right = left + step * len(places)
    found = []
    for tick, shown in zip(scale.ticks, scale.shown, strict=True):
        y = scale(tick)
        found.append(f'<line x1="{left}" y1="{y:.2f}" x2="{right:.1f}" y2="{y:.2f}" stroke="{FAINT}"/>')
        found.append(text(left - 6, round(y + 4, 2), shown, "end", css="tick"))
    for number_of, (name, marks) in enumerate(series):
        colour, y = COLOURS[number_of % len(COLOURS)], 14.0 + 16 * number_of
        found += [shape(number_of, left + 6, y - 4, colour, ""), text(left + 16, y, name)]
        for place, mark in enumerate(marks):
            if mark is not None:
                x = left + step * (place + (number_of + 1) / (len(series) + 1))
                found.append(_estimate(mark, number_of, x, scale, colour))
    found += [
        text(left + step * (place + 0.5), top + height + 16, shown, "middle") for place, shown in enumerate(places)
    ]
    found.append(text(left - 6, top + height + 16, "layer", "end"))
    return svg(right + 10, top + height + 24, "".join(found), title)


def _estimate(mark: Mark, kind: int, x: float, scale: Scale, colour: str) -> str:
    whisker = ""
    if mark.low is not None and mark.high is not None:
        whisker = (
            f'<line x1="{x:.1f}" y1="{scale(mark.low):.2f}" x2="{x:.1f}" y2="{scale(mark.high):.2f}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
    return whisker + shape(kind, x, scale(mark.value), colour, f'data-at="{html.escape(mark.at, quote=True)}"')


def shape(kind: int, x: float, y: float, colour: str, marks: str) -> str:
    """The symbol of a series: filled and open circles differ in print, too."""
    fill = colour if kind % 2 == 0 else "#fff"
    return f'<circle cx="{x:.1f}" cy="{y:.2f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2" {marks}/>'


def bars(rows: Sequence[tuple[str, Shown, float]], title: str) -> str:
    """Horizontal bars from zero, each with its name and its number."""
    left, wide, tall, top = 190.0, 360.0, 24.0, 8.0
    low = min([0.0, *(value for _, _, value in rows)])
    high = max([0.0, *(value for _, _, value in rows)])
    span = (high - low) or 1.0
    zero = left - low / span * wide
    found = [f'<line x1="{zero:.1f}" y1="{top}" x2="{zero:.1f}" y2="{top + tall * len(rows)}" stroke="{INK}"/>']
    for place, (name, shown, value) in enumerate(rows):
        y, end = top + place * tall, left + (value - low) / span * wide
        x = min(zero, end)
        found.append(text(left - 10, y + 16, name, "end"))
        found.append(
            f'<rect x="{x:.1f}" y="{y + 4:.1f}" width="{abs(end - zero):.1f}" height="{tall - 8}" fill="{COLOURS[0]}"/>'
        )
        found.append(text(left + wide + 10, y + 16, shown))
    return svg(left + wide + 90, top * 2 + tall * len(rows), "".join(found), title)
