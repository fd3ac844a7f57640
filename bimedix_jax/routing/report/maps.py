"""Maps of layers by experts: differences in load, levels of claims, and loads."""

import math
from collections.abc import Callable, Sequence

from bimedix_jax.routing.claims import LEVELS
from bimedix_jax.routing.report import figures
from bimedix_jax.routing.report.contents import Contents
from bimedix_jax.routing.report.figures import MapCell
from bimedix_jax.routing.report.sheets import Sheet, Shown, number, points, words

LETTERS = {"none": "-", "association": "A", "token": "T", "geometry": "G", "learned": "L", "functional": "F"}


def grid(sheet: Sheet, places: Sequence[int], made: Callable[[int], MapCell]) -> tuple[list, list[Shown], list[Shown]]:
    """Cells by layer and expert, with the names of both."""
    layers = list(dict.fromkeys(sheet.value(at, "layer") for at in places))
    experts = len(places) // len(layers)
    rows = [places[start : start + experts] for start in range(0, len(places), experts)]
    cells = [[made(at) for at in row] for row in rows]
    return cells, [words(sheet, row[0], "layer") for row in rows], [words(sheet, at, "expert") for at in rows[0]]


def is_written(sheet: Sheet, places: Sequence[int]) -> bool:
    """Whether the map of these cells has numbers or letters in its cells; otherwise it has a key."""
    return len({sheet.value(at, "expert") for at in places}) <= figures.WRITTEN_EXPERTS


def extremes(sheet: Sheet, places: Sequence[int], column: str) -> list[int]:
    """The rows with the least and the largest value."""
    known = sorted((sheet.value(at, column), at) for at in places if math.isfinite(sheet.value(at, column)))
    return [known[0][1], known[-1][1]] if known else []


def difference_map(contents: Contents, places: Sequence[int]) -> str:
    sheet = contents.cells

    def cell(at: int) -> MapCell:
        claimed = sheet.value(at, "level") not in (None, "none")
        return MapCell(value=sheet.value(at, "estimate"), shown=points(sheet, at, "estimate"), outlined=claimed)

    found, title = grid(sheet, places, cell), "difference in load by layer and expert"
    key = [(sheet.value(at, "estimate"), points(sheet, at, "estimate")) for at in extremes(sheet, places, "estimate")]
    return figures.layer_map(*found, title=title, signed=True, key=key)


def level_map(contents: Contents, places: Sequence[int]) -> str:
    sheet = contents.cells

    def cell(at: int) -> MapCell:
        level = sheet.value(at, "level")
        return MapCell(value=LEVELS.index(level) / (len(LEVELS) - 1), shown=LETTERS[level], outlined=level != "none")

    found = grid(sheet, places, cell)
    key = [(LEVELS.index(level) / (len(LEVELS) - 1), level) for level in LEVELS]
    return figures.layer_map(*found, title="level of the claim by layer and expert", signed=False, reach=1.0, key=key)


def load_map(contents: Contents, places: Sequence[int]) -> str:
    sheet = contents.load

    def cell(at: int) -> MapCell:
        return MapCell(value=sheet.value(at, "share"), shown=number(sheet, at, "share", ".1f", 100))

    key = [(sheet.value(at, "share"), cell(at).shown) for at in extremes(sheet, places, "share")]
    return figures.layer_map(*grid(sheet, places, cell), title="load by layer and expert", signed=False, key=key)
