"""Rows of a file, a folder of files or a data set on the Hugging Face hub, one at a time, in any of these formats:

    .jsonl .ndjson     one object a line            .json       an array, one object of rows, or objects in a row
    .csv .tsv          usually with a header        .parquet    in batches (needs pyarrow)
    .xlsx              the first sheet, with a header

All but the last two can be compressed (.gz). A row that cannot be parsed raises when its fields are read, so that
`Quarantine.build` notes it. A file that is broken as a whole is an error.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from bimedix_jax import files
from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import delimited, encodings, hub, json_stream, markup, script, texts
from bimedix_jax.curation.readers.encodings import opened
from bimedix_jax.curation.readers.hub import HubSet
from bimedix_jax.curation.readers.reading import Reading, split_of
from bimedix_jax.data.records import Record, Split, explain
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
      lines: number of lines of the file that the row spans.
      part: what the split is read from; None: the name of the file.
    """

    file: str
    line: int
    content: Any
    key: str | None = None
    lines: int = 1
    part: str | None = None

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
        """The name of the file without its endings. It is part of the ids of rows."""
        return re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|xlsx|xml)(\.gz)?$", "", self.file)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that depend on the fields."""
        text = json.dumps(self.fields(), sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def rows(
    place: Place,
    keyed: bool = False,
    header: bool = True,
    reading: Reading | None = None,
    account: SourceAccount | None = None,
) -> Iterator[Row]:
    """All rows of a place, ordered by file name and then by their position in the file.

    Args:
        keyed: a .json file that is one object has a row per entry.
        header: a CSV file has one; otherwise its fields are named "0", "1", ...
        reading: options of the source.
        account: counts the lines.

    Raises:
        BimedixError: there is nothing to read, or a file is damaged.
    """
    read = _Files(keyed, header, reading or Reading(), account or SourceAccount())
    if not isinstance(place, HubSet):
        for path, name in data_files(place, ENDINGS):
            yield from read.rows_of(path, name)
        return
    for part in hub.parts(place):
        if isinstance(part, Path):
            for row in read.rows_of(part, f"{place.label}/{part.name}"):
                yield replace(row, part=place.split)
        else:
            for number, content in enumerate(part, start=1):
                read.account.lines += 1
                yield Row(place.label, number, content, part=place.split)


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
    source: str,
    found: Iterable[Row],
    quarantine: Quarantine,
    make: Callable[[Row, dict[str, Any]], Record],
    reading: Reading | None = None,
    own: bool = False,
) -> Iterator[Record]:
    """`make(row, fields)` of every row. Rows for which it raises are quarantined.

    The fields are without HTML, and the language of each record is compared with its script (readers/script.py). `own`:
    the rows are records already, and are only checked.
    """
    how, account = reading or Reading(), quarantine.account

    def build(row: Row) -> Record:
        try:
            fields = row.fields()
            account.saw(fields)
            row = replace(row, content=fields)  # parsed once
            record = make(row, fields if own else how.clean(fields, account))
            stated = how.language is not None
            from_script = reading is not None and not (own or stated)
            return script.settled(record, account, stated=stated, from_script=from_script, own=own)
        except Exception as error:
            account.failed(_problem(error))
            raise

    for row in found:
        record = quarantine.build(source, row.file, row.line, build, row)
        account.built(row.lines, record is not None)
        if record is not None:
            yield record


def _problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    return explain(error) if isinstance(error, ValidationError) else str(error)[:200]


def tidy(text: object) -> str:
    """Collapse runs of spaces, normalise line breaks, and strip both ends.

    Raises:
        ValueError: `text` is not a string, or was not valid UTF-8.
    """
    if not isinstance(text, str):
        raise ValueError("a text is missing" if text is None else f"{text!r} is not a text")
    text.encode("utf-8")  # raises UnicodeEncodeError, a ValueError, if the file was not valid UTF-8
    return re.sub(r"[ \t\xa0]+", " ", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def said(value: object) -> str:
    """`tidy` of a text that must be there.

    Raises:
        ValueError: it is missing, also if a program wrote a word such as NULL or nan for that.
    """
    if texts.is_missing(value):
        raise ValueError("a text is missing")
    return tidy(value)


def optional(value: object) -> str:
    """`tidy` of a text that may be missing; then ""."""
    return "" if texts.is_missing(value) else tidy(value)


def is_yes(name: str, value: str) -> bool:
    """Whether an option is yes. Raises WrongSource if it is neither yes nor no."""
    if value not in ("yes", "no"):
        raise WrongSource(f"{name}={value} is neither yes nor no")
    return value == "yes"


def split_for(row: Row, reading: Reading, account: SourceAccount, otherwise: Split | None = None) -> Split | None:
    """The split stated as an option, else `otherwise`, else the one that the name of the row's file implies."""
    if reading.split is not None or otherwise is not None:
        return reading.split or otherwise
    name = row.part or row.file
    if name not in account.splits:
        found, ambiguous = split_of(name)
        if found is None and not ambiguous:
            return None
        account.splits[name] = found
    return account.splits[name]


def row_id(source: str, row: Row, own: object = None) -> str:
    """An id from the name of the file, the row's own id or else its line, and a hash of its fields.

    It depends neither on other rows nor on where the file is, and different rows of two files of one name differ in it.
    """
    return f"{source}/{row.stem}/{row.line if own is None or own == '' else own}-{row.fingerprint}"


@dataclass(frozen=True)
class _Files:
    """Reads files as `rows` describes."""

    keyed: bool
    header: bool
    reading: Reading
    account: SourceAccount

    def rows_of(self, path: Path, name: str) -> Iterator[Row]:
        """The rows of one file, counted."""
        plain = name.lower().removesuffix(".gz")
        is_text = plain.endswith(_TEXT)
        if self.reading.encoding is not None and not is_text:
            raise WrongSource(f"encoding= is for text, but {path} is none; leave it out")
        if is_text and self.reading.encoding is None:
            with opened(path) as file:
                encodings.check_utf8(file.read(encodings.BLOCK), path)
        files.require_content(path, text=name.lower().endswith(_TEXT) and self.reading.encoding is None)
        if plain.endswith((".csv", ".tsv")):
            return self._delimited(path, name)
        if self.reading.delimiter is not None:
            raise WrongSource(f"delimiter= is for text with columns, but {path} has none; leave it out")
        if self.reading.key is not None and not plain.endswith(".json"):
            raise WrongSource(f"key= names the key of the rows in a .json file, but {path} has none; leave it out")
        if plain.endswith((".jsonl", ".ndjson")):
            return self._lines(path, name)
        if plain.endswith(".json"):
            return self._entries(_json(path, name, self))
        return self._entries(_parquet(path, name) if plain.endswith(".parquet") else _sheet(path, name, self))

    def _entries(self, found: Iterator[Row]) -> Iterator[Row]:
        for row in found:
            self.account.lines += row.lines
            yield row

    def _lines(self, path: Path, name: str) -> Iterator[Row]:
        for row in _json_lines(path, name, self.reading.encoding):
            self.account.lines += 1
            if row is None:
                self.account.blank += 1
            else:
                yield row

    def _delimited(self, path: Path, name: str) -> Iterator[Row]:
        if self.reading.key is not None:
            raise WrongSource(f"key= names the key of the rows in a .json file, but {path} has none; leave it out")

        encoding = self.reading.encoding

        @contextmanager
        def text() -> Iterator[TextIO]:
            with (
                opened(path, encoding) as file,
                io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as lines,
            ):
                yield lines

        delimited.csv.field_size_limit(MAX_LINE)
        found = delimited.table_rows(text, name, self.reading.delimiter, self.header, self.account)
        for row, content in found:
            yield Row(name, row.line, content, lines=row.lines)


def _json_lines(path: Path, name: str, encoding: str | None) -> Iterator[Row | None]:
    """A row for each line, None for a blank one."""
    with opened(path, encoding) as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Row(name, number, ValueError(f"the line is longer than {MAX_LINE >> 20} MiB"))
            else:
                yield Row(name, number, line) if line.strip() else None


def _json(path: Path, name: str, how: _Files) -> Iterator[Row]:
    with opened(path, how.reading.encoding) as file:
        opening = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        first_line = opening.partition(b"\n")[0].strip()
    keys = None if how.reading.key is None else how.reading.key.split(".")
    if keys is None and opening.startswith(b"{") and not how.keyed:
        with opened(path, how.reading.encoding) as file:
            keys = json_stream.keys_of_rows(file, path, name, how.account)
        if keys is None and (first_line.endswith(b"}") or b"\n" not in opening):
            # JSON lines with the ending .json, such as MedMCQA's; a broken line is one rejected row
            for row in _json_lines(path, name, how.reading.encoding):
                how.account.lines += row is None
                how.account.blank += row is None
                if row is not None:
                    yield row
            return
    with opened(path, how.reading.encoding) as file:
        if keys is not None:
            found = json_stream.entries_under(file, path, keys)
        elif how.keyed and opening.startswith(b"{"):
            found = json_stream.keyed_entries(file, path)
        else:
            found = json_stream.entries(file, path)
        for number, (key, value) in enumerate(found, start=1):
            yield Row(name, number, value, key)


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


def _sheet(path: Path, name: str, how: _Files) -> Iterator[Row]:
    names: list[str] | None = None
    for number, values in markup.sheet_rows(path):
        if not any(values) or (how.header and names is None):
            how.account.lines += 1
            how.account.blank += not any(values)
            how.account.header += any(values)
            names = [value.strip() for value in values] if any(values) else names
        elif names is None:
            yield Row(name, number, {str(index): value for index, value in enumerate(values)})
        else:
            yield Row(name, number, delimited.named(names, values + [""] * (len(names) - len(values))))
