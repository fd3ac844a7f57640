"""Rows of published question sets as documents. The layout of a row is recognised by its columns.

Nothing is tidied: a prompt must be the one that lm-evaluation-harness makes of the same row.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from bimedix_jax.curation.readers.choices import label_of
from bimedix_jax.data.records import Record, question_of
from bimedix_jax.errors import BimedixError

DECISIONS = {"en": ("yes", "no", "maybe"), "ar": ("نعم", "لا", "ربما")}
_LABEL = re.compile(r"^\s*\w{1,12}(?: \w{1,12})?:\s+")
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
    """Index of the right choice from its number, its letter or its text; -1 if it is none of these."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = int(value) - first
        return number if 0 <= number < len(choices) else -1
    text = str(value).strip()
    label = label_of(text)
    for letters in (string.ascii_uppercase, "أبجدهو"):
        if len(label) == 1 and label in letters:
            return letters.index(label) if letters.index(label) < len(choices) else -1
    return choices.index(text) if text in choices else -1


def of_record(row: Mapping[str, Any]) -> Document:
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
        flags=tuple(record.provenance.get("flags", ())),
    )


def of_choices(row: Mapping[str, Any]) -> Document:
    """{question, choices, answer}, as MMLU on the hub and MBZUAI/human_translated_arabic_mmlu, and one's own sets."""
    choices = tuple(row["choices"])
    return Document(
        id=None if row.get("id") is None else str(row["id"]),
        question=row["question"],
        choices=choices,
        answer=answer_of(row["answer"], choices),
        language=row.get("language"),
        subject=row.get("subject") or row.get("specialty") or None,
        context=row.get("context") or "",
        flags=tuple(row.get("flags") or ()),
    )


def of_medmcqa(row: Mapping[str, Any]) -> Document:
    """MedMCQA: `cop` counts from 1 in its authors' JSON files, which have `choice_type` but no hub columns."""
    choices = tuple(row[name] for name in ("opa", "opb", "opc", "opd"))
    return Document(
        id=None if row.get("id") is None else f"medmcqa/{row['id']}",
        question=row["question"],
        choices=choices,
        answer=answer_of(row["cop"], choices, int(row.get("first_option", 0))),
        subject=row.get("subject_name") or None,
    )


def of_medqa(row: Mapping[str, Any]) -> Document:
    """MedQA as GBaker/MedQA-USMLE-4-options-hf has it: {sent1, sent2, ending0.., label}."""
    choices = tuple(row[f"ending{number}"] for number in range(5) if row.get(f"ending{number}") is not None)
    own = row.get("id")
    return Document(
        id=None if own is None else f"medqa/{own}",
        question=row["sent1"],
        choices=choices,
        answer=answer_of(row["label"], choices),
    )


def of_options(row: Mapping[str, Any]) -> Document:
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


def of_mmmlu(row: Mapping[str, Any]) -> Document:
    """openai/MMMLU: {Question, A, B, C, D, Answer, Subject}."""
    choices = tuple(row[letter] for letter in "ABCD")
    number = row.get("Unnamed: 0")
    return Document(
        id=None if number is None else str(number),
        question=row["Question"],
        choices=choices,
        answer=answer_of(row["Answer"], choices),
        subject=str(row["Subject"]).split("_test")[0],
    )


def of_arabicmmlu(row: Mapping[str, Any]) -> Document:
    """MBZUAI/ArabicMMLU: {Question, Context, Option 1 .. Option 5, Answer Key, Subject}."""
    choices = tuple(str(row[name]) for name in (f"Option {number}" for number in range(1, 6)) if row.get(name))
    return Document(
        id=None if row.get("ID") is None else str(row["ID"]),
        question=f"{row['Context']}\n\n{row['Question']}" if row.get("Context") else row["Question"],
        choices=choices,
        answer=answer_of(row["Answer Key"], choices),
        subject=row.get("Subject"),
    )


def of_medarabench(row: Mapping[str, Any]) -> Document:
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


def of_pubmedqa(row: Mapping[str, Any]) -> Document:
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
        context="\n".join(contexts),
    )


LAYOUTS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any]], Document]], ...] = (
    (frozenset({"conversations", "choices", "answer"}), of_record),
    (frozenset({"question", "opa", "opb", "opc", "opd", "cop"}), of_medmcqa),
    (frozenset({"sent1", "ending0", "label"}), of_medqa),
    (frozenset({"question", "options", "answer_idx"}), of_options),
    (frozenset({"Question", "A", "B", "C", "D", "Answer"}), of_mmmlu),
    (frozenset({"Question", "Option 1", "Answer Key"}), of_arabicmmlu),
    (frozenset({"Question", "Option A", "Correct Answer"}), of_medarabench),
    (frozenset({"final_decision", "QUESTION", "CONTEXTS"}), of_pubmedqa),
    (frozenset({"final_decision", "question", "context"}), of_pubmedqa),
    (frozenset({"question", "choices", "answer"}), of_choices),
)
"""Columns that a row must have, and how it is read; the first that fits."""


def document_of(row: Mapping[str, Any], where: str) -> Document:
    """A row as a document.

    Raises:
      BimedixError: its columns are those of no known layout, or a value is wrong; the message begins with `where`.
    """
    for columns, read in LAYOUTS:
        if columns <= set(row):
            try:
                found = read(row)
            except (ValueError, TypeError, KeyError) as error:
                raise BimedixError(f"{where}: {error}; correct the row or remove it") from error
            return checked(found, where)
    wanted = "; ".join(", ".join(sorted(columns)) for columns, _ in LAYOUTS)
    raise BimedixError(
        f"{where} has the columns {', '.join(map(str, row))}; a question needs those of one of: {wanted}"
    )


def checked(found: Document, where: str) -> Document:
    """The document, flagged if it has no valid answer.

    Raises:
      BimedixError: a text is missing, or there are not at least two choices.
    """
    texts = found.choices if NO_QUESTION in found.flags else (found.question, *found.choices)
    if len(found.choices) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BimedixError(f"{where}: a question needs a text and at least two choices, none of them empty")
    if not isinstance(found.context, str):
        raise BimedixError(f"{where}: the context is not a text")
    return found if found.answer >= 0 else dataclasses.replace(found, flags=(*found.flags, NO_VALID_OPTION))
