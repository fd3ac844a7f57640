"""Elements of an XML file, and rows of a spreadsheet (which is zipped XML), one at a time.

This needs only the standard library: one sheet of 690 rows (MedicationQA) does not justify a spreadsheet package.
Document type declarations are refused, and with them all entities that a file could define.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast
from xml.etree import ElementTree

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import stand_in

CHUNK = 1 << 16
MAX_STRINGS = 64 << 20
"""Most bytes of a spreadsheet's table of texts, which is kept in memory; larger sheets must be saved as CSV."""

_CELL = re.compile(r"([A-Z]{1,3})\d+")


def elements(file: IO[bytes], path: Path, names: set[str]) -> Iterator[ElementTree.Element]:
    """Outermost elements with a local name in `names`, each complete. An element is freed when the next is requested.

    Raises:
        BimedixError: the file is not XML in an encoding that contains ASCII, or declares a document type.
    """
    parser = ElementTree.XMLPullParser(["start", "end"])
    open_elements: list[ElementTree.Element] = []
    wanted = 0  # how many of `names` are open
    prolog = b""  # the bytes before the root element, where a document type can be declared
    try:
        while data := file.read(CHUNK):
            if not open_elements:
                problem = None if prolog else stand_in(data[:512], markup=True)
                if problem:
                    raise BimedixError(f"{path} {problem}.")
                prolog += data
                if b"<!DOCTYPE" in prolog or b"\0" in prolog:
                    raise BimedixError(f"{path} declares a document type or is not UTF-8; do not trust it")
            parser.feed(data)
            for event, element in cast("Iterator[tuple[str, ElementTree.Element]]", parser.read_events()):
                matches = local_name(element) in names
                if event == "start":
                    open_elements.append(element)
                    wanted += matches
                    continue
                open_elements.pop()
                wanted -= matches
                if matches and not wanted:
                    yield element
                if not wanted:
                    element.clear()
                    if open_elements:
                        open_elements[-1].remove(element)
        parser.close()
    except ElementTree.ParseError as error:
        raise BimedixError(f"{path} is not valid XML ({error}); fetch it again") from error


def local_name(element: ElementTree.Element) -> str:
    """The name of an element without its namespace."""
    return element.tag.rpartition("}")[2]


def text_of(element: ElementTree.Element | None) -> str:
    """All text inside an element, "" for none."""
    return "" if element is None else "".join(element.itertext())


def sheet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number from 1, texts) of each row of a workbook's first sheet; an empty cell is "".

    Raises:
        BimedixError: the file is not a workbook, or its texts are too large.
    """
    try:
        with zipfile.ZipFile(path) as book:
            strings = _shared_strings(book, path)
            with book.open(_first_sheet(book, path)) as sheet:
                for index, row in enumerate(elements(sheet, path, {"row"}), start=1):
                    yield int(row.get("r", index)), _cells(row, strings, path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BimedixError(f"{path} is not a workbook ({error}); save it as CSV and name that file") from error


def _shared_strings(book: zipfile.ZipFile, path: Path) -> list[str]:
    """The texts to which cells refer by number."""
    name = "xl/sharedStrings.xml"
    if name not in book.namelist():
        return []
    if book.getinfo(name).file_size > MAX_STRINGS:
        raise BimedixError(
            f"{path} contains more than {MAX_STRINGS >> 20} MiB of text; save it as CSV and name that file"
        )
    with book.open(name) as file:
        return [_plain(item) for item in elements(file, path, {"si"})]


def _plain(item: ElementTree.Element) -> str:
    """The text of a string item without phonetic guides."""
    guides = {id(text) for guide in item.iter() if local_name(guide) == "rPh" for text in guide.iter()}
    return "".join(part.text or "" for part in item.iter() if local_name(part) == "t" and id(part) not in guides)


def _first_sheet(book: zipfile.ZipFile, path: Path) -> str:
    with book.open("xl/workbook.xml") as file:
        sheet = next(elements(file, path, {"sheet"}), None)
        key = None if sheet is None else next((v for k, v in sheet.attrib.items() if k.endswith("}id")), None)
    with book.open("xl/_rels/workbook.xml.rels") as file:
        targets = {item.get("Id"): item.get("Target", "") for item in elements(file, path, {"Relationship"})}
    if key is None or key not in targets:
        raise BimedixError(f"{path} has no sheet; save it as CSV and name that file")
    target = targets[key]
    return target.lstrip("/") if target.startswith("/") else f"xl/{target}"


def _cells(row: ElementTree.Element, strings: list[str], path: Path) -> list[str]:
    texts: dict[int, str] = {}
    for index, cell in enumerate(cell for cell in row if local_name(cell) == "c"):
        place = _CELL.fullmatch(cell.get("r", ""))
        column = index if place is None else _column(place[1])
        value = next((part.text or "" for part in cell if local_name(part) == "v"), "")
        kind = cell.get("t")
        if kind == "s":
            if not value.isdigit() or int(value) >= len(strings):
                raise BimedixError(
                    f"{path} refers to text {value!r}, which is missing; save it as CSV and name that file"
                )
            texts[column] = strings[int(value)]
        else:
            texts[column] = _plain(cell) if kind == "inlineStr" else value
    return [texts.get(column, "") for column in range(max(texts, default=-1) + 1)]


def _column(letters: str) -> int:
    """A -> 0, Z -> 25, AA -> 26."""
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1
