"""Open questions by patients and consumers: MedQuAD, LiveQA and MedicationQA."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from bimedix_jax.curation.accounting import SourceAccount
from bimedix_jax.curation.quarantine import Quarantine
from bimedix_jax.curation.readers import markup
from bimedix_jax.curation.readers.encodings import opened
from bimedix_jax.curation.readers.reading import Reading
from bimedix_jax.curation.readers.rows import (
    Place,
    Row,
    build_all,
    data_files,
    optional,
    row_id,
    rows,
    said,
    split_for,
    tidy,
)
from bimedix_jax.data.records import Record, conversation

MEDQUAD_FILE = "medquad_answered.jsonl.gz"


def medquad(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """MedQuAD (Ben Abacha and Demner-Fushman 2019): consumer questions with answers from NIH sites.

    Reads either the authors' folders of XML, or gzip JSONL of the answered pairs {id, source, url, focus, qtype,
    question, answer}. In the XML two of three answers were removed for copyright; those pairs are quarantined as empty.
    A page has several questions, and pages of different sites describe the same condition. The provenance names the
    condition as `group`, so that a split by group does not put the same question into both sets.
    """
    how, account = reading or Reading(), quarantine.account
    answered = place / MEDQUAD_FILE if isinstance(place, Path) and place.is_dir() else place
    if isinstance(place, Path) and isinstance(answered, Path) and not answered.is_file():
        found = _medquad_pages(place, account)
    else:
        found = rows(answered, reading=how, account=account)

    def make(row: Row, fields: dict[str, Any]) -> Record:
        page = fields["page"] if "page" in fields else f"{fields['source']}/{fields['id']}"
        asked, answer = said(fields["question"]).replace(" ?", "?"), tidy(how.reply(fields["answer"]))
        return Record(
            id=f"medquad/{page}/{row.line}",
            language=how.spoken(asked, answer),
            kind="qa",
            source="medquad",
            licence="CC-BY-4.0",
            conversations=conversation(asked, answer),
            provenance={
                "url": fields["url"],
                "focus": fields["focus"],
                "question_type": fields["qtype"],
                "group": " ".join(tidy(fields["focus"]).casefold().split()),
            },
        )

    yield from build_all("medquad", found, quarantine, make, how)


def _medquad_pages(folder: Path, account: SourceAccount) -> Iterator[Row]:
    """A row for each pair in the authors' files of one page each; `line` is the number of the pair in its page.

    Five of the 11,274 pages use other names for the same elements.
    """
    for path, name in data_files(folder, (".xml",)):
        with opened(path) as file:
            for page in markup.elements(file, path, {"Document", "DiseaseFile", "doc"}):
                about = {
                    "page": re.sub(r"\.xml$", "", name),
                    "url": page.get("url"),
                    "focus": markup.text_of(_first(page, "Focus", "doctitle-focus")),
                }
                pairs = [item for item in page.iter() if item.tag in ("QAPair", "pair")]
                account.lines += max(1, len(pairs))
                account.blank += not pairs
                for number, pair in enumerate(pairs, start=1):
                    question = _first(pair, "Question", "question")
                    content = {
                        **about,
                        "qtype": None if question is None else question.get("qtype"),
                        "question": markup.text_of(question),
                        "answer": markup.text_of(_first(pair, "Answer", "answer")),
                    }
                    yield Row(name, number, content)


def _first(element: Element, *names: str) -> Element | None:
    return next((found for name in names for found in element.iter(name)), None)


def liveqa(place: Path, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """LiveQA, medical task of TREC 2017 (Ben Abacha et al. 2017): XML of questions sent to the NLM.

    Each answer of each question is a record. In the training files an answer belongs to a sub-question, whose focus and
    type are in the provenance. Message and subject are the patient's words in their original spelling.
    """

    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        subject, message = (_lines(optional(fields[name])) for name in ("subject", "message"))
        asked = "\n".join(text for text in (subject, message) if text)
        answer = _lines(said(how.reply(fields["answer"])))
        return Record(
            id=f"liveqa/{row.stem}/{fields['id']}",
            language=how.spoken(asked, answer),
            kind="qa",
            source="liveqa",
            licence="not stated",
            split=split_for(row, how, account),
            conversations=conversation(asked, answer),
            provenance={name: fields[name] for name in ("question_id", "focus", "type", "url") if fields[name]}
            | {"group": f"liveqa/{row.stem}/{fields['question_id']}"},
        )

    yield from build_all("liveqa", _liveqa_answers(place, account), quarantine, make, how)


def _liveqa_answers(place: Path, account: SourceAccount) -> Iterator[Row]:
    for path, name in data_files(place, (".xml",)):
        with opened(path) as file:
            number = 0
            for index, question in enumerate(markup.elements(file, path, {"NLM-QUESTION"}), start=1):
                answers = list(_answers(question))
                account.lines += max(1, len(answers))
                account.blank += not answers
                for answer in answers:
                    number += 1
                    name_of = answer["id"] or f"{index}/{number}"
                    yield Row(name, number, {**_asked(question, index), **answer, "id": name_of})


def _asked(question: Element, index: int) -> dict[str, Any]:
    own = question.get("qid") or question.get("questionid") or str(index)
    texts = {tag: markup.text_of(next(question.iter(tag), None)) for tag in ("SUBJECT", "MESSAGE")}
    return {"question_id": own, "subject": texts["SUBJECT"], "message": texts["MESSAGE"]}


def _answers(question: Element) -> Iterator[dict[str, Any]]:
    """Answers of the training files (SUB-QUESTION/ANSWERS/ANSWER) and of the test file (RefAnswer, ReferenceAnswer)."""
    parts = list(question.iter("SUB-QUESTION")) or [question]
    for part in parts:
        about = {tag.lower(): [tidy(markup.text_of(item)) for item in part.iter(tag)] for tag in ("FOCUS", "TYPE")}
        holders = [item for tag in ("RefAnswer", "ReferenceAnswer") for item in part.iter(tag)]
        for holder in holders or [part]:
            for answer in holder.iter("ANSWER"):
                own = answer.get("answerid") or answer.get("pairid") or holder.get("aid")
                url = tidy(markup.text_of(next(holder.iter("AnswerURL"), None))) if holders else ""
                yield {**about, "id": own, "answer": markup.text_of(answer), "url": url}


def _lines(text: str) -> str:
    """`text` without the indentation of its lines in the XML."""
    return "\n".join(line for line in (part.strip() for part in tidy(text).split("\n")) if line)


def medicationqa(place: Place, quarantine: Quarantine, *, reading: Reading | None = None) -> Iterator[Record]:
    """MedicationQA (Ben Abacha et al. 2019), 690 rows.

    The columns are Question, Focus (Drug), Question Type, Answer, Section Title and URL. Reads the authors' workbook, a
    CSV file made from it, or the copies on the hub.
    """
    columns = {"question_type": "Question Type", "section": "Section Title", "url": "URL"}

    how, account = reading or Reading(), quarantine.account

    def make(row: Row, fields: dict[str, Any]) -> Record:
        drug = optional(fields.get("Focus (Drug)"))
        provenance = {name: fields[column] for name, column in columns.items() if fields.get(column)}
        asked, answer = said(fields["Question"]), tidy(how.reply(fields["Answer"]))
        return Record(
            id=row_id("medicationqa", row),
            language=how.spoken(asked, answer),
            kind="qa",
            source="medicationqa",
            licence="not stated",
            split=split_for(row, how, account),
            conversations=conversation(asked, answer),
            provenance={**provenance, "drug": drug} if drug else provenance,
        )

    yield from build_all("medicationqa", rows(place, reading=how, account=account), quarantine, make, how)
