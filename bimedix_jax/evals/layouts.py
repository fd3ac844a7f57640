"""Rows of published question sets as documents. The layout of a row is recognised by its columns.

Nothing is tidied: a prompt must be the one that lm-evaluation-harness makes of the same row.
"""

import dataclasses
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from bimedix_jax.curation.quarantine import WrongSource, reason_of
from bimedix_jax.curation.readers.answers import Column, number_of
from bimedix_jax.curation.readers.choices import Choices, label_of
from bimedix_jax.data.records import Record, question_of
from bimedix_jax.errors import BimedixError

DECISIONS = {"en": ("yes", "no", "maybe"), "ar": ("نعم", "لا", "ربما")}
_LABEL = re.compile(r"^\s*\w{1,12}(?: \w{1,12})?:\s+")
_MARKS = re.compile("[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff]")
NO_VALID_OPTION = "no_valid_option"
"""Flag of a question whose stated answer is none of its options."""
NO_QUESTION = "no_question"
"""Flag of a row of MedAraBench without a question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A question as tasks see it.

    Attributes:
      id: equal for a question and its translation.
      answer: index of the right choice; -1 if the set names none, with the flag NO_VALID_OPTION.
      context: the abstract, for PubMedQA.
      flags: problems of the text.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    id: str | None = None
    language: str | None = None
    subject: str | None = None
    context: str = ""
    flags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The columns of a data set."""
        return {**dataclasses.asdict(self), "choices": list(self.choices), "flags": list(self.flags)}


def answer_of(value: Any, choices: tuple[str, ...], first: int = 0) -> int:
    """Index of the right choice from its number, its letter or its text; -1 if it is none of these, or the text of two.

    Args:
      first: number of the first choice.
    """
    number = number_of(value)
    if number is not None:
        return number - first if 0 <= number - first < len(choices) else -1
    text = without_marks(str(value)).strip()
    label = label_of(text)
    for letters in (string.ascii_uppercase, "أبجدهو"):
        if len(label) == 1 and label in letters:
            return letters.index(label) if letters.index(label) < len(choices) else -1
    texts = [without_marks(choice).strip() for choice in choices]
    return texts.index(text) if texts.count(text) == 1 else -1


def without_marks(text: str) -> str:
    """The text without marks of direction, which are not seen."""
    return _MARKS.sub("", text)


def texts_of(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a list, which may be written as JSON in a cell of a table; None and an empty cell have none.

    Raises:
      ValueError: it is no list of texts; a text would be split into its letters.
    """
    if isinstance(value, str) and value.strip().startswith("["):
        value = json.loads(value)
    if value is None or value == "":
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f'{name} is {value!r}, which is not a list of texts; write ["...", "..."]')
    return tuple(value)


def of_record(row: Mapping[str, Any], _: int) -> Document:
    """A record of ours, as `bimedix data translate` writes it; `provenance.flags` are its flags."""
    record = Record.model_validate(row)
    if record.choices is None or record.answer is None:
        raise ValueError(f"record {record.id} has no choices")
    human = next(turn.value for turn in record.conversations if turn.speaker == "human")
    context, question = "", question_of(record)
    if record.kind == "qa" and "\n" in human:  # PubMedQA: an abstract, then the question; a translator words the labels
        context, question = (_LABEL.sub("", part) for part in human.rsplit("\n", 1))
    return Document(
        id=record.id.removesuffix("/ar").removesuffix("/en"),
        question=question.rstrip("\n"),
        choices=record.choices,
        answer=record.answer,
        language=record.language,
        subject=record.specialty or record.provenance.get("subject"),
        context=context,
        flags=texts_of(record.provenance.get("flags"), "flags"),
    )


def of_choices(row: Mapping[str, Any], first: int) -> Document:
    """{question, choices, answer}, as MMLU on the hub and MBZUAI/human_translated_arabic_mmlu, and one's own sets."""
    choices = texts_of(row["choices"], "choices")
    return Document(
        id=None if row.get("id") is None else str(row["id"]),
        question=row["question"],
        choices=choices,
        answer=answer_of(row["answer"], choices, first),
        language=row.get("language"),
        subject=row.get("subject") or row.get("specialty") or None,
        context=row.get("context") or "",
        flags=texts_of(row.get("flags"), "flags"),
    )


def of_medmcqa(row: Mapping[str, Any], first: int) -> Document:
    """MedMCQA: `cop` counts from 1 in its authors' JSON files, and from 0 on the hub."""
    choices = tuple(row[name] for name in ("opa", "opb", "opc", "opd"))
    return Document(
        id=None if row.get("id") is None else f"medmcqa/{row['id']}",
        question=row["question"],
        choices=choices,
        answer=answer_of(row["cop"], choices, first),
        subject=row.get("subject_name") or None,
    )


def of_medqa(row: Mapping[str, Any], first: int) -> Document:
    """MedQA as GBaker/MedQA-USMLE-4-options-hf has it: {sent1, sent2, ending0.., label}."""
    choices = tuple(row[f"ending{number}"] for number in range(5) if row.get(f"ending{number}") is not None)
    own = row.get("id")
    return Document(
        id=None if own is None else f"medqa/{own}",
        question=row["sent1"],
        choices=choices,
        answer=answer_of(row["label"], choices, first),
    )


def of_options(row: Mapping[str, Any], _: int) -> Document:
    """{question, options: {A: ...}, answer_idx}, as MedQA's authors and MedAgents have it."""
    labels = sorted(row["options"])
    choices = tuple(row["options"][label] for label in labels)
    subject, own = row.get("subject"), row.get("realidx", row.get("id"))
    letter = str(row["answer_idx"]).strip()
    return Document(
        id=None if own is None else "/".join(str(part) for part in (subject, own) if part is not None),
        question=row["question"],
        choices=choices,
        answer=labels.index(letter) if letter in labels else -1,
        subject=subject,
    )


def of_mmmlu(row: Mapping[str, Any], first: int) -> Document:
    """openai/MMMLU: {Question, A, B, C, D, Answer, Subject}."""
    choices = tuple(row[letter] for letter in "ABCD")
    number = row.get("Unnamed: 0")
    return Document(
        id=None if number is None else str(number),
        question=row["Question"],
        choices=choices,
        answer=answer_of(row["Answer"], choices, first),
        subject=str(row["Subject"]).split("_test")[0],
    )


def of_arabicmmlu(row: Mapping[str, Any], first: int) -> Document:
    """MBZUAI/ArabicMMLU: {Question, Context, Option 1 .. Option 5, Answer Key, Subject}."""
    choices = tuple(str(row[name]) for name in (f"Option {number}" for number in range(1, 6)) if row.get(name))
    return Document(
        id=None if row.get("ID") is None else str(row["ID"]),
        question=f"{row['Context']}\n\n{row['Question']}" if row.get("Context") else row["Question"],
        choices=choices,
        answer=answer_of(row["Answer Key"], choices, first),
        subject=row.get("Subject"),
    )


def of_medarabench(row: Mapping[str, Any], _: int) -> Document:
    """MedAraBench (arXiv 2602.01714): {Question, Option A .. Option F, Correct Answer, Medical Specialty}."""
    options = {letter: str(row.get(f"Option {letter}") or "").strip() for letter in "ABCDEF"}
    letters = [letter for letter, text in options.items() if text]
    letter = str(row["Correct Answer"]).strip().upper()
    return Document(
        id=str(row["Question Number"]),
        question=row["Question"],
        choices=tuple(options[letter] for letter in letters),
        answer=letters.index(letter) if letter in letters else -1,
        subject=row.get("Medical Specialty"),
        flags=() if str(row["Question"] or "").strip() else (NO_QUESTION,),
    )


def of_pubmedqa(row: Mapping[str, Any], _: int) -> Document:
    """PubMedQA in its authors' spelling (QUESTION, CONTEXTS) or the hub's (question, context.contexts)."""
    authors = "QUESTION" in row
    contexts = row["CONTEXTS"] if "CONTEXTS" in row else row["context"]["contexts"]
    decision = str(row["final_decision"]).strip().lower()
    language = "ar" if decision in DECISIONS["ar"] else "en"
    choices = DECISIONS[language]
    own = row.get("pmid", row.get("pubid"))
    return Document(
        id=None if own is None else f"pubmedqa/{own}",
        question=row["QUESTION" if authors else "question"],
        choices=choices,
        answer=choices.index(decision) if decision in choices else -1,
        context="\n".join(texts_of(contexts, "contexts")),
    )


class RowLayout(NamedTuple):
    """How rows with certain columns are read.

    Attributes:
      columns: those that a row must have.
      read: makes a document of a row; its second argument is the number of the first choice.
      answer: the column whose numbers may count from 0 or from 1; None: there are none.
    """

    columns: frozenset[str]
    read: Callable[[Mapping[str, Any], int], Document]
    answer: str | None = None


LAYOUTS = (
    RowLayout(frozenset({"conversations", "choices", "answer"}), of_record),
    RowLayout(frozenset({"question", "opa", "opb", "opc", "opd", "cop"}), of_medmcqa, "cop"),
    RowLayout(frozenset({"sent1", "ending0", "label"}), of_medqa, "label"),
    RowLayout(frozenset({"question", "options", "answer_idx"}), of_options),
    RowLayout(frozenset({"Question", "A", "B", "C", "D", "Answer"}), of_mmmlu, "Answer"),
    RowLayout(frozenset({"Question", "Option 1", "Answer Key"}), of_arabicmmlu, "Answer Key"),
    RowLayout(frozenset({"Question", "Option A", "Correct Answer"}), of_medarabench),
    RowLayout(frozenset({"final_decision", "QUESTION", "CONTEXTS"}), of_pubmedqa),
    RowLayout(frozenset({"final_decision", "question", "context"}), of_pubmedqa),
    RowLayout(frozenset({"question", "choices", "answer"}), of_choices, "answer"),
)
"""The first whose columns a row has is that of the row."""


def layout_of(row: Mapping[str, Any]) -> RowLayout | None:
    """The layout of a row, None if it is unknown."""
    return next((layout for layout in LAYOUTS if layout.columns <= set(row)), None)


def first_number(rows: Iterable[tuple[int, Mapping[str, Any]]], where: str) -> int | None:
    """The number of the first choice in the answers of a file: 0, or 1 if the highest is the number of choices. None if
    no answer is a number. Rows that cannot be read are left to `document_of`.

    Args:
      rows: with their lines.

    Raises:
      BimedixError: the numbers do not tell; the message begins with `where`.
    """
    column, name = Column(), ""
    for line, row in rows:
        layout = layout_of(row)
        number = None if layout is None or layout.answer is None else number_of(row[layout.answer])
        if layout is None or layout.answer is None or number is None:
            continue
        try:
            choices = layout.read(row, 0).choices
        except (ValueError, TypeError, KeyError):
            continue
        column.add(line, number, Choices(choices))
        name = layout.answer
    try:
        reading = column.decide(name, "write letters (A, B, C) or the texts of the choices in place of numbers")
    except WrongSource as error:
        raise BimedixError(f"{where}: {error}") from None
    return None if reading is None else int(reading == "from1")


def document_of(row: Mapping[str, Any], where: str, first: int = 0) -> Document:
    """A row as a document.

    Args:
      first: the number of the first choice, where an answer is a number.

    Raises:
      BimedixError: its columns are those of no known layout, or a value is wrong; the message begins with `where`.
    """
    layout = layout_of(row)
    if layout is None:
        wanted = "; ".join(", ".join(sorted(known.columns)) for known in LAYOUTS)
        raise BimedixError(
            f"{where} has the columns {', '.join(map(str, row))}; a question needs those of one of: {wanted}; rename "
            "its columns, or remove the row"
        )
    try:
        found = layout.read(row, first)
    except (ValueError, TypeError, KeyError) as error:
        raise BimedixError(f"{where}: {row_problem(error)}; correct the row or remove it") from error
    return checked(found, where)


def row_problem(error: ValueError | TypeError | KeyError) -> str:
    """What is wrong with a row, in one line."""
    summed_up = isinstance(error, ValidationError | KeyError | json.JSONDecodeError)
    return reason_of(error)[0] if summed_up else str(error)


def checked(found: Document, where: str) -> Document:
    """The document, flagged if it has no valid answer.

    Raises:
      BimedixError: a text is missing, or there are not at least two choices.
    """
    texts = found.choices if NO_QUESTION in found.flags else (found.question, *found.choices)
    if len(found.choices) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BimedixError(
            f"{where}: a question needs a text and at least two choices, none of them empty; correct the row or "
            "remove it"
        )
    if not isinstance(found.context, str):
        raise BimedixError(f"{where}: the context is not a text; correct the row or remove it")
    return found if found.answer >= 0 else dataclasses.replace(found, flags=(*found.flags, NO_VALID_OPTION))
