"""General readers: tables with a column mapping, files of records, and the bundled sample."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers.rows import Place, Row, build_all, data_files, parse_split, row_id, rows, tidy
from bimedix_jax.data import records
from bimedix_jax.data.records import LETTERS, Language, Record, conversation
from bimedix_jax.errors import BimedixError


def table(
    place: Place,
    quarantine: Quarantine,
    *,
    question: str,
    answer: str,
    licence: str,
    choices: str | None = None,
    context: str | None = None,
    system: str | None = None,
    explanation: str | None = None,
    specialty: str | None = None,
    id: str | None = None,  # noqa: A002 (names a column, like the other options)
    source: str = "table",
    language: str = "en",
    split: str | None = None,
) -> Iterator[Record]:
    """JSONL, JSON, CSV, TSV, Parquet, XLSX or a data set on the hub, by the names of its columns.

    `question`, `answer`, `context`, `system`, `explanation`, `specialty` and `id` name columns. A dot selects a field
    of an object, as in `context.text`. `choices` names one column with a list, or several columns separated by commas;
    the column `answer` then has the letter, the number from 0 or the text of the right choice. `licence`, `source`,
    `language` (en, ar) and `split` (train, heldout) are values for the whole table.
    """
    spoken = parse_language(language)

    def optional(fields: dict[str, Any], column: str | None) -> str:
        value = None if column is None else _column(fields, column)
        return "" if value is None else tidy(value)

    def make(row: Row, fields: dict[str, Any]) -> Record:
        asked = tidy(_column(fields, question))
        about = optional(fields, context)
        shown = f"{about}\n{asked}" if about else asked
        reply = _column(fields, answer)
        options: tuple[str, ...] | None = None
        right: int | None = None
        if choices is None:
            said = tidy(reply)
        else:
            options = _choices(fields, choices)
            right = _index(reply, options)
            shown = records.multiple_choice_question(shown, options)
            said = records.multiple_choice_answer(options, right, spoken, optional(fields, explanation))
        return Record(
            id=row_id(source, row, None if id is None else _column(fields, id)),
            language=spoken,
            kind="qa" if options is None else "mcqa",
            source=source,
            licence=licence,
            specialty=optional(fields, specialty) or None,
            split=parse_split(split, row),
            conversations=conversation(shown, said, system=optional(fields, system) or None),
            choices=options,
            answer=right,
            provenance={"question": asked} if about else {},
        )

    yield from build_all(source, rows(place), quarantine, make)


def bundled_sample(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """The bilingual sample of the package, the only source without a path."""
    if folder != Path():
        raise BimedixError(f"sample takes no path, but {folder} was given; write `sample` alone")
    for number, record in enumerate(records.sample(), start=1):
        found = quarantine.build("sample", "sample", number, _itself, record)
        if found is not None:
            yield found


def own_records(place: Place, quarantine: Quarantine) -> Iterator[Record]:
    """Records in the format of this project: a JSONL file (also .gz), or a folder of them."""

    def make(_: Row, fields: dict[str, Any]) -> Record:
        return Record.model_validate(fields)

    if isinstance(place, Path):
        for path, _ in data_files(place, (".jsonl", ".jsonl.gz")):
            yield from build_all("records", rows(path), quarantine, make)
    else:
        yield from build_all("records", rows(place), quarantine, make)


def parse_language(text: str) -> Language:
    """The language given as an option.

    Raises:
        WrongSource: it is neither en nor ar.
    """
    if text == "en" or text == "ar":
        return text
    raise WrongSource(f"language={text} is not a known language; write language=en or language=ar")


def _itself(record: Record) -> Record:
    return record


def _column(fields: dict[str, Any], name: str) -> Any:
    value: Any = fields
    for part in [name] if name in fields else name.split("."):
        value = value[part]
    return value


def _choices(fields: dict[str, Any], names: str) -> tuple[str, ...]:
    if "," in names:
        found = [_column(fields, name) for name in names.split(",")]
    else:
        found = _column(fields, names)
        if not isinstance(found, list):
            raise ValueError(f"{names} is not a list of choices")
    return tuple(tidy(choice) for choice in found)


def _index(answer: object, options: tuple[str, ...]) -> int:
    """The index of the option that `answer` names by its text, its letter, or its number from 0."""
    text = str(answer).strip()
    if tidy(text) in options:
        found = options.index(tidy(text))
    elif len(text) == 1 and text.upper() in LETTERS:
        found = LETTERS.index(text.upper())
    elif text.isdecimal():
        found = int(text)
    else:
        raise ValueError(f"answer {text!r} is not a choice, letter or number")
    if found >= len(options):
        raise ValueError(f"answer {text!r} is not among {len(options)} choices")
    return found
