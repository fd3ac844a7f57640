"""General readers: tables with a column mapping, files of records, and the bundled sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import Quarantine, WrongSource
from bimedix_jax.curation.readers import answers as answer_columns
from bimedix_jax.curation.readers.choices import Choices, choices_in_columns, choices_of, split_labelled
from bimedix_jax.curation.readers.reading import Reading
from bimedix_jax.curation.readers.rows import (
    Place,
    Row,
    build_all,
    data_files,
    is_yes,
    optional,
    row_id,
    rows,
    said,
    split_for,
    tidy,
)
from bimedix_jax.curation.readers.texts import is_missing
from bimedix_jax.data import records
from bimedix_jax.data.records import Record, Split, conversation
from bimedix_jax.errors import BimedixError


def table(
    place: Place,
    quarantine: Quarantine,
    *,
    question: str,
    answer: str,
    licence: str,
    choices: str | None = None,
    answers: str | None = None,
    first_option: str | None = None,
    context: str | None = None,
    system: str | None = None,
    explanation: str | None = None,
    specialty: str | None = None,
    id: str | None = None,  # noqa: A002 (names a column, like the other options)
    header: str = "yes",
    source: str = "table",
    reading: Reading | None = None,
) -> Iterator[Record]:
    """JSONL, JSON, CSV, TSV, Parquet, XLSX or a data set on the hub, by the names of its columns.

    `question`, `answer`, `context`, `system`, `explanation`, `specialty` and `id` name columns. A dot selects a field
    of an object, as in `context.text`. With `header=no` a text file has no header, and its columns are named 0, 1, 2.

    `choices` names one column in any form of readers/choices.py, several columns separated by commas, or the column of
    the question if its text ends with the choices. The column `answer` then has letters, labels, numbers or texts of
    choices; readers/answers.py decides over all rows which. `answers` states it instead, and `first_option` (0 or 1)
    the first number. `licence` and `source` are values for the whole table.
    """
    how = reading or Reading()
    with_header = is_yes("header", header)
    columns = _Columns(question, answer, choices, context, system, explanation, specialty, id)
    columns.check()
    stated = _forced(answers, first_option)
    if choices is None and stated is not None:
        raise WrongSource("answers= and first_option= say how choices are named; name their column with choices=")
    if choices is not None:
        stated = stated or _read_column(columns, rows(place, header=with_header, reading=how), how)
        if stated is not None:
            quarantine.account.note(f"answers: column {answer} is read as {answer_columns.READINGS[stated][0]}")

    def make(row: Row, fields: dict[str, Any]) -> Record:
        split = split_for(row, how, quarantine.account)
        return columns.record(row, fields, source, licence, split, how, stated or "letter")

    found = rows(place, header=with_header, reading=how, account=quarantine.account)
    yield from build_all(source, found, quarantine, make, how)


@dataclass(frozen=True)
class _Columns:
    """The names of the columns of a table; None for those that it lacks."""

    question: str
    answer: str
    choices: str | None
    context: str | None
    system: str | None
    explanation: str | None
    specialty: str | None
    id: str | None

    def check(self) -> None:
        """Raise WrongSource if one column is to be two parts of a record, other than question and choices."""
        parts = [(part, getattr(self, part)) for part in ("question", "answer", "context", "system", "explanation")]
        parts = [(part, name) for part, name in parts if name is not None]
        if self.choices is not None and self.choices != self.question:
            parts += [("choices", name) for name in self.choices.split(",")]
        for number, (part, name) in enumerate(parts):
            other = next((before for before, taken in parts[:number] if taken == name), None)
            if other is not None:
                raise WrongSource(f"{other}= and {part}= both name the column {name!r}; name a column for each")

    def record(
        self,
        row: Row,
        fields: dict[str, Any],
        source: str,
        licence: str,
        split: Split | None,
        how: Reading,
        stated: str,
    ) -> Record:
        """The record of a row. `stated` is the reading of its answer."""

        def text(column: str | None) -> str:
            return optional(None if column is None else _column(fields, column))

        own = None if self.id is None else _column(fields, self.id)
        asked, found = self.question_and_choices(fields)
        about = text(self.context)
        shown = f"{about}\n{asked}" if about else asked
        reply = _column(fields, self.answer)
        choices: tuple[str, ...] | None = None
        right: int | None = None
        if found is None:
            told = tidy(how.reply(reply))
            spoken = how.spoken(asked, told)
        else:
            choices = tuple(tidy(choice) for choice in found.texts)
            right = answer_columns.index_of(stated, _single(reply), found)
            spoken = how.spoken_in_exam(asked, choices)
            shown = records.multiple_choice_question(shown, choices)
            told = records.multiple_choice_answer(choices, right, spoken, text(self.explanation))
        return Record(
            id=row_id(source, row, None if is_missing(own) else own),
            language=spoken,
            kind="qa" if choices is None else "mcqa",
            source=source,
            licence=licence,
            specialty=text(self.specialty) or None,
            split=split,
            conversations=conversation(shown, told, system=text(self.system) or None),
            choices=choices,
            answer=right,
            provenance={"question": asked} if about else {},
        )

    def question_and_choices(self, fields: dict[str, Any]) -> tuple[str, Choices | None]:
        """The question and its choices, None if the table has none."""
        asked = said(_column(fields, self.question))
        if self.choices is None:
            return asked, None
        if self.choices == self.question:
            found = split_labelled(asked)
            if found is None or not found.stem:
                raise ValueError("the question does not end with choices that have labels such as (A), A. or أ)")
            return found.stem, found
        if "," in self.choices and self.choices not in fields:
            names = self.choices.split(",")
            return asked, choices_in_columns(names, [_column(fields, name) for name in names])
        return asked, choices_of(_column(fields, self.choices))


def _forced(answers: str | None, first_option: str | None) -> str | None:
    if first_option not in (None, "0", "1"):
        raise WrongSource(f"first_option={first_option} is neither 0 nor 1")
    if answers is not None and answers not in answer_columns.READINGS:
        raise WrongSource(f"answers={answers} is none of {', '.join(answer_columns.READINGS)}")
    if answers is not None and first_option is not None and answers != f"from{first_option}":
        raise WrongSource(f"answers={answers} and first_option={first_option} contradict each other; leave one out")
    return answers or (None if first_option is None else f"from{first_option}")


def _read_column(columns: _Columns, found: Iterator[Row], how: Reading) -> str | None:
    """The reading of the answers, decided over all rows; rows that cannot be read are left to the second pass."""
    column = answer_columns.Column()
    for row in found:
        try:
            fields = how.clean(row.fields(), SourceAccount())
            choices = columns.question_and_choices(fields)[1]
            reply = _single(_column(fields, columns.answer))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
        if choices is not None:
            column.add(row.line, reply, choices)
    return column.decide(columns.answer)


def _single(answer: Any) -> Any:
    """An answer, also from a list of one."""
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def bundled_sample(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """The bilingual sample of the package, the only source without a path."""
    if folder != Path():
        raise BimedixError(f"sample takes no path, but {folder} was given; write `sample` alone")
    for number, record in enumerate(records.sample(), start=1):
        quarantine.account.lines += 1
        found = quarantine.build("sample", "sample", number, _itself, record)
        quarantine.account.built(1, found is not None)
        if found is not None:
            yield found


def own_records(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """Records in the format of this project: a JSONL file (also .gz), or a folder of them.

    The language of a record whose script contradicts it is corrected and counted. With `language`, records in the other
    language are left out.
    """
    wanted = None if reading is None else reading.language

    def make(_: Row, fields: dict[str, Any]) -> Record:
        record = Record.model_validate(fields)
        if wanted not in (None, record.language):
            raise ValueError(f"the record is in {record.language}, but language={wanted} was stated")
        return record

    paths = [path for path, _ in data_files(place, (".jsonl", ".jsonl.gz"))] if isinstance(place, Path) else [place]
    for path in paths:
        found = rows(path, account=quarantine.account)
        yield from build_all("records", found, quarantine, make, reading, own=True)


def _itself(record: Record) -> Record:
    return record


def _column(fields: dict[str, Any], name: str) -> Any:
    value: Any = fields
    for part in [name] if name in fields else name.split("."):
        value = value[part]
    return value
