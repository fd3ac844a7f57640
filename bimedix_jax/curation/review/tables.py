"""Review without Label Studio: a CSV file for spreadsheets (a row for each segment) or JSONL (a line for each item).

Reviewers fill in `decision` (accept, edit, reject), and optionally `edited`, `score` and `comment`. In CSV, any one of
an item's rows can have its decision, score and comment.

The other columns are not read back, so a change of a text there is an error: a correction would be lost.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bimedix_jax.curation.arabic import plain
from bimedix_jax.curation.review.items import ReviewItem, Verdict, dump
from bimedix_jax.curation.review.presentation import changed, machine
from bimedix_jax.curation.review.segments import digest, has_digest, segments
from bimedix_jax.data.records import explain
from bimedix_jax.errors import BimedixError

COLUMNS: tuple[str, ...] = tuple(
    "item digest segment role source translation edited decision score comment reviewer time machine".split()
)
ONCE_PER_ITEM = ("decision", "score", "comment", "reviewer", "time")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(items: Iterable[ReviewItem], reviewer: str | None, blind: bool) -> str:
    """CSV in UTF-8 with a byte order mark, which Excel needs to show Arabic."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS)
    writer.writeheader()
    for item in items:
        for part in segments(item):
            row = {"item": item.id, "segment": part.id, "role": part.role, "source": part.source}
            row["machine"] = "" if blind else "; ".join(machine(item))
            row |= {"translation": part.translation, "digest": digest(item), "reviewer": reviewer or ""}
            writer.writerow({key: _no_formula(value) for key, value in row.items()})
    return "\ufeff" + buffer.getvalue()


def _no_formula(text: str) -> str:
    """A cell that spreadsheets read as text, even if a model wrote `=HYPERLINK(...)` into it."""
    return f"'{text}" if text.startswith(_FORMULA) else text


class JsonSegment(BaseModel):
    """A segment; the reviewer fills in `edited`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    role: str = ""
    source: str = ""
    translation: str = ""
    edited: str | None = None


class JsonItem(BaseModel):
    """A line of the JSONL format."""

    model_config = ConfigDict(extra="forbid")

    item: str
    digest: str
    segments: list[JsonSegment]
    decision: str | None = None
    score: float | str | None = None
    comment: str = ""
    reviewer: str | None = None
    time: datetime | None = None
    machine: str = ""


def to_jsonl(items: Iterable[ReviewItem], reviewer: str | None, blind: bool) -> str:
    """A line for each item."""
    lines = []
    for item in items:
        parts = [
            JsonSegment(id=part.id, role=part.role, source=part.source, translation=part.translation)
            for part in segments(item)
        ]
        said = "" if blind else "; ".join(machine(item))
        line = JsonItem(item=item.id, digest=digest(item), segments=parts, reviewer=reviewer, machine=said)
        lines.append(dump(line) + "\n")
    return "".join(lines)


def from_csv(text: str, where: str, items: Mapping[str, ReviewItem], saved: datetime, reviewer: str) -> list[Verdict]:
    """The verdicts of a CSV file. `saved` and `reviewer` replace an empty time and reviewer.

    Raises:
        BimedixError: a row cannot be read or does not fit its item.
    """
    text = text.removeprefix("\ufeff")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True))
    except csv.Error as error:
        raise BimedixError(f"{where} is not a CSV file ({error}); save it as CSV in UTF-8") from error
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=2):
        place = f"{where}, row {number}"
        missing = [name for name in ("item", "digest", "segment", "decision") if name not in row]
        if missing or None in row:
            what = f"no column {missing[0]!r}" if missing else "more cells than the header"
            raise BimedixError(f"{place} has {what}; keep the header of the export: {', '.join(COLUMNS)}")
        cells = {name: (value or "").strip() for name, value in row.items()}
        if not any(cells.values()):
            continue
        item = _item(cells["item"].removeprefix("'"), cells["digest"], place, items)
        known = found.setdefault(item.id, {"place": place, "texts": {}, "seen": {}, "changed": []})
        texts = {name: cells[name].removeprefix("'") for name in ("source", "translation", "edited") if name in cells}
        _segment(known, item, cells["segment"], texts, place)
        for name in ONCE_PER_ITEM:
            value = cells.get(name, "").removeprefix("'")
            if value and known.get(name, value) != value:
                raise BimedixError(f"{place}: {name} is {value!r} here and {known[name]!r} above; its rows must agree")
            known |= {name: value} if value else {}
    return [
        verdict
        for name, given in found.items()
        if (verdict := _verdict(items[name], given, saved, reviewer)) is not None
    ]


def _segment(known: dict[str, Any], item: ReviewItem, name: str, texts: Mapping[str, str], place: str) -> None:
    """Add a segment of an item to what is known of the item: its edited text, and whether another text was changed.

    Raises:
        BimedixError: the item has no such segment, or has it twice with different edited texts.
    """
    parts = {part.id: part for part in segments(item)}
    if name not in parts:
        raise BimedixError(f"{place}: item {item.id!r} has no segment {name!r}; keep the column as it was")
    edited = texts.get("edited", "").strip()
    if known["seen"].setdefault(name, edited) != edited:
        raise BimedixError(f"{place}: segment {name!r} of item {item.id!r} is there twice, with different edited texts")
    if edited:
        known["texts"][name] = edited
    exported = {"source": parts[name].source, "translation": parts[name].translation}
    for column, before in exported.items():
        is_read = column == "translation" and edited  # then the edited text replaces it
        if column in texts and not is_read and _words(texts[column]) != _words(before):
            known["changed"].append((place, name, column))


def _words(text: str) -> list[str]:
    """The words of a cell without the mark of `_no_formula`. Spreadsheets change line breaks and spaces."""
    return text.strip().removeprefix("'").split()


def _require_whole(item: ReviewItem, given: Mapping[str, Any]) -> None:
    """Raise BimedixError if a text was changed where it is not read back, or if segments are missing."""
    for place, name, column in given["changed"]:
        remedy = (
            "write the correction in `edited` and leave `translation` as exported"
            if column == "translation"
            else "restore it; if the English is wrong, reject the item"
        )
        raise BimedixError(f"{place}: `{column}` of segment {name!r} of item {item.id!r} was changed; {remedy}")
    missing = [part.id for part in segments(item) if part.id not in given["seen"]]
    if missing:
        raise BimedixError(
            f"{given['place']}: item {item.id!r} lacks segment {', '.join(map(repr, missing))}; restore what was "
            "exported, or clear the decision"
        )


def _delimiter(text: str) -> str:
    """What separates the columns of the header. Excel writes `;` where the comma is the decimal mark, or tabs."""
    header = text.lstrip("\r\n").partition("\n")[0]
    counts = {mark: header.count(mark) for mark in (",", ";", "\t", "،", "؛")}
    return max(counts, key=lambda mark: counts[mark])


def _score(text: str, place: str) -> float | None:
    """A score as people write it: `85`, `٨٥`, `85 %`, `85,5`, `٨٥٫٥`, `85/100`; None if the cell is empty.

    Raises:
        BimedixError: it is none of these.
    """
    number = re.sub(r"\s*(?:%|/\s*100)$", "", plain(text).strip())
    if not number:
        return None
    if not re.fullmatch(r"[+-]?\d+(?:\.\d*|,\d{0,2})?", number):
        raise BimedixError(f"{place}: the score {text!r} is not a number from 0 to 100; correct the cell")
    return float(number.replace(",", "."))


def from_jsonl(text: str, where: str, items: Mapping[str, ReviewItem], saved: datetime, reviewer: str) -> list[Verdict]:
    """The verdicts of a JSONL file, as `from_csv`. A line may also be a `Verdict`, as `import` writes them."""
    found = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        verdict = _line(line, place, items, saved, reviewer)
        if verdict is not None:
            found.append(verdict)
    return found


def _line(line: str, place: str, items: Mapping[str, ReviewItem], saved: datetime, reviewer: str) -> Verdict | None:
    try:
        document = json.loads(line)
        if isinstance(document, dict) and "segments" not in document:
            verdict = Verdict.model_validate(document)
            _item(verdict.item, None, place, items)
            return verdict
        row = JsonItem.model_validate(document)
    except ValidationError as error:
        raise BimedixError(f"{place}: {explain(error)}; keep the fields of the export") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BimedixError(f"{place} is not JSON ({error}); keep one item a line") from error
    item = _item(row.item, row.digest, place, items)
    given: dict[str, Any] = {
        "place": place,
        "texts": {},
        "seen": {},
        "changed": [],
        "decision": row.decision,
        "score": row.score,
        "comment": row.comment,
        "reviewer": row.reviewer,
        "time": row.time.isoformat() if row.time else None,
    }
    for part in row.segments:
        texts = {
            name: getattr(part, name) or "" for name in part.model_fields_set & {"source", "translation", "edited"}
        }
        _segment(given, item, part.id, texts, place)
    return _verdict(item, given, saved, reviewer)


def _item(name: str, seen: str | None, place: str, items: Mapping[str, ReviewItem]) -> ReviewItem:
    item = items.get(name)
    if item is None:
        raise BimedixError(f"{place}: there is no item {name!r} in the review file; give the file that was exported")
    if seen is not None and not has_digest(item, seen):
        if re.fullmatch(r"[\d.,]+(?:[eE][+-]?\d+)?", plain(seen)):
            raise BimedixError(
                f"{place}: a spreadsheet rounded the digest {seen!r} as a number; export the items again"
            )
        raise BimedixError(f"{place}: item {name!r} has been translated again since it was exported; export it again")
    return item


def _verdict(item: ReviewItem, given: dict[str, Any], saved: datetime, reviewer: str) -> Verdict | None:
    """A verdict, or None if there is no decision."""
    place, texts = given["place"], given["texts"]
    before = {part.id: part.translation for part in segments(item)}
    edited = changed(texts, before)
    decision = (given.get("decision") or "").strip().lower()
    if decision != "reject" and (decision or given["texts"] or given["changed"]):
        _require_whole(item, given)
    if not decision and not edited:
        if given.get("score") not in (None, "") or given.get("comment"):
            raise BimedixError(f"{place}: item {item.id!r} has a score or a comment and no decision; add a decision")
        return None
    stated = "accept" if edited and decision == "accept" else None
    if edited and decision in ("", "accept"):
        decision = "edit"  # a changed text is an edit, even if the decision is empty or `accept`
    time = plain(given.get("time") or saved.isoformat())
    score = given.get("score")
    score = _score(score, place) if isinstance(score, str) else score
    try:
        return Verdict.model_validate(
            {
                "item": item.id,
                "reviewer": given.get("reviewer") or reviewer,
                "time": time if _has_zone(time) else f"{time}{saved.strftime('%z')}",
                "decision": decision,
                "score": score,
                "edited": (edited or None) if decision == "edit" else None,
                "comment": given.get("comment") or "",
                "stated": stated,
            }
        )
    except ValidationError as error:
        raise BimedixError(f"{place}: item {item.id!r}: {explain(error)}; correct the row") from error


def _has_zone(time: str) -> bool:
    try:
        return datetime.fromisoformat(time).tzinfo is not None
    except ValueError:
        return True  # validation reports it
