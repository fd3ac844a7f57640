"""Rows of a file, a folder of files or a data set on the Hugging Face hub, one at a time, in any of these formats:

    .jsonl .ndjson     one object a line            .json       an array, one object of rows, or objects in a row
    .csv .tsv          with a header                .parquet    in batches (needs pyarrow)
    .xlsx              the first sheet, with a header

All but the last two can be compressed (.gz). A row that cannot be parsed raises when its fields are read, so that
`Quarantine.build` notes it. A file that is broken as a whole is an error.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from bimedix_jax import files
from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import hub, json_stream, markup
from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.data.records import Record, Split
from bimedix_jax.errors import BimedixError

Place = Path | HubSet

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ENDINGS = (*_TEXT, *(f"{ending}.gz" for ending in _TEXT), ".parquet", ".xlsx")

MAX_LINE = 64 << 20
"""Most bytes of a line and most characters of a CSV field; longer ones are quarantined without being parsed."""

PARQUET_BATCH = 256
SAVED_BY_DATASETS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True, slots=True)
class Row:
    """One unparsed or parsed row of a file.

    Attributes:
      file: name of the file relative to the folder, or label of the data set on the hub.
      line: number of the line, of the row of a sheet, or of the entry, from 1.
      content: the fields; or a line of JSON; or an exception if the row could not be read.
      key: name of the row if the file is one object of rows.
    """

    file: str
    line: int
    content: Any
    key: str | None = None

    def fields(self) -> dict[str, Any]:
        """The row's fields by name.

        Raises:
            ValueError: the row is not valid in the format of its file.
        """
        content = self.content
        if isinstance(content, Exception):
            raise content
        if isinstance(content, bytes):
            content = json.loads(content)
        if not isinstance(content, dict):
            raise ValueError(f"the row is a {type(content).__name__}, not an object")
        return content

    @property
    def stem(self) -> str:
        """The name of the file without its endings. It is part of the id of rows that have no id."""
        return re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|xlsx|xml)(\.gz)?$", "", self.file)


def rows(place: Place, keyed: bool = False, header: bool = True) -> Iterator[Row]:
    """All rows of a place, ordered by file name and then by their position in the file.

    `keyed`: a .json file that is one object has a row per entry. Without `header` the fields of a CSV row are named
    "0", "1", ...

    Raises:
        BimedixError: there is nothing to read, or a file is damaged.
    """
    if not isinstance(place, HubSet):
        for path, name in data_files(place, ENDINGS):
            yield from _of_file(path, name, keyed, header)
        return
    for part in hub.parts(place):
        if isinstance(part, Path):
            yield from _of_file(part, f"{place.label}/{part.name}", keyed, header)
        else:
            for number, content in enumerate(part, start=1):
                yield Row(place.label, number, content)


def data_files(place: Path, endings: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """(path, name relative to the folder) of a file, or of the files of a folder with one of `endings`, by name.

    Raises:
        BimedixError: there are no such files, or `datasets` saved the folder.
    """
    if place.is_file():
        if not place.name.lower().endswith(endings):
            raise BimedixError(
                f"{place} has none of the endings {', '.join(endings)}; name a file of one of these formats"
            )
        yield place, place.name
        return
    names = sorted(
        path.relative_to(place).as_posix()
        for path in place.rglob("*")
        if path.name.lower().endswith(endings) and not path.name.startswith(".")
    )
    if any(name.rpartition("/")[2] in SAVED_BY_DATASETS for name in names):
        raise BimedixError(f"{place} was saved by the `datasets` package; read it with NAME=hf:{place}")
    if not names:
        raise BimedixError(
            f"{place} has no file ending in {', '.join(endings)}; name the folder that contains the data"
        )
    for name in names:
        yield files.inside(place, name), name


def named_file(folder: Path, name: str) -> Path:
    """`folder / name`.

    Raises:
        BimedixError: there is no such file.
    """
    path = folder / name
    if not path.is_file():
        raise BimedixError(f"there is no {name} in {folder}; name the folder that contains the published files")
    return path


def build_all(
    source: str, found: Iterable[Row], quarantine: Quarantine, make: Callable[[Row, dict[str, Any]], Record]
) -> Iterator[Record]:
    """`make(row, fields)` of every row. Rows for which it raises are quarantined."""

    def build(row: Row) -> Record:
        return make(row, row.fields())

    for row in found:
        record = quarantine.build(source, row.file, row.line, build, row)
        if record is not None:
            yield record


def tidy(text: object) -> str:
    """Collapse runs of spaces, normalise line breaks, and strip both ends.

    Raises:
        ValueError: `text` is not a string, or was not valid UTF-8.
    """
    if not isinstance(text, str):
        raise ValueError("a text is missing" if text is None else f"{text!r} is not a text")
    text.encode("utf-8")  # raises UnicodeEncodeError, a ValueError, if the file was not valid UTF-8
    return re.sub(r"[ \t\xa0]+", " ", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def split_of(name: str) -> Split | None:
    """The split that the name of a file or hub split implies, None if it implies none.

    Validation and test parts are held out, since models are compared on them.
    """
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & {"test", "dev", "val", "valid", "validation", "heldout"}:
        return "heldout"
    return "train" if words & {"train", "training"} else None


def parse_split(text: str | None, row: Row) -> Split | None:
    """The split given as an option, or else implied by the name of the row's file."""
    if text is None:
        return split_of(row.file)
    if text not in ("train", "heldout"):
        raise WrongSource(f"split={text} is not a split; write split=train or split=heldout")
    return text


def row_id(source: str, row: Row, own: object = None) -> str:
    """An id from the row's own id, or else from its file and line, so that ids do not depend on other rows."""
    return f"{source}/{row.stem}/{row.line}" if own is None or own == "" else f"{source}/{own}"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed if its name ends in .gz."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast("IO[bytes]", file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BimedixError(f"{path} is damaged ({error}); fetch it again") from error


def _of_file(path: Path, name: str, keyed: bool, header: bool) -> Iterator[Row]:
    plain = name.lower().removesuffix(".gz")
    files.require_content(path, text=name.lower().endswith(_TEXT))
    if plain.endswith((".jsonl", ".ndjson")):
        return _lines(path, name)
    if plain.endswith(".json"):
        return _json(path, name, keyed)
    if plain.endswith((".csv", ".tsv")):
        return _csv(path, name, "\t" if plain.endswith(".tsv") else ",", header)
    return _parquet(path, name) if plain.endswith(".parquet") else _sheet(path, name)


def _lines(path: Path, name: str) -> Iterator[Row]:
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Row(name, number, ValueError(f"the line is longer than {MAX_LINE >> 20} MiB"))
            elif line.strip():
                yield Row(name, number, line)


def _json(path: Path, name: str, keyed: bool) -> Iterator[Row]:
    with opened(path) as file:
        opening = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        first_line = opening.partition(b"\n")[0].strip()
    if opening.startswith(b"{") and not keyed and (first_line.endswith(b"}") or b"\n" not in opening):
        yield from _lines(
            path, name
        )  # JSON lines with the ending .json, such as MedMCQA's; a broken line is one rejected row
        return
    with opened(path) as file:
        entries = json_stream.entries
        if keyed and opening.startswith(b"{"):
            entries = json_stream.keyed_entries
        for number, (key, value) in enumerate(entries(file, path), start=1):
            yield Row(name, number, value, key)


def _csv(path: Path, name: str, delimiter: str, header: bool) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter)
        names = next(reader, None) if header else None
        if names is not None and len(set(names)) < len(names):
            raise BimedixError(f"{path} has two columns with the same name ({', '.join(names)}); rename one")
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(name, reader.line_num, ValueError(str(error)))
                continue
            if values:
                yield Row(name, reader.line_num, _named(names, values))


def _named(names: list[str] | None, values: list[str]) -> dict[str, str] | ValueError:
    if names is None:
        return {str(index): value for index, value in enumerate(values)}
    if len(names) != len(values):
        return ValueError(f"{len(values)} columns, the header has {len(names)}")
    return dict(zip(names, values, strict=True))


def _parquet(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise BimedixError(f"reading {path} needs pyarrow; install it with: pip install 'bimedix_jax[data]'") from error
    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(PARQUET_BATCH):
                for content in batch.to_pylist():
                    number += 1
                    yield Row(name, number, content)
    except pyarrow.ArrowException as error:
        raise BimedixError(f"{path} is not a Parquet file, or damaged ({error}); fetch it again") from error


def _sheet(path: Path, name: str) -> Iterator[Row]:
    found = markup.sheet_rows(path)
    names = next(found, (0, []))[1]
    for number, values in found:
        if any(values):
            yield Row(name, number, _named(names, values + [""] * (len(names) - len(values))))
