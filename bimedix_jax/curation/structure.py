"""Splits an English record into segments, which are translated, and a frame, which is kept.

The frame holds the turns, the letters of the choices and the answer key. The model sees only the segments. Code puts
their translations back into the frame, so the model cannot mistranslate the letter of the right choice or "Answer: ".
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from bimedix_jax.data.records import (
    ANSWER_PREFIX,
    LETTERS,
    Record,
    Turn,
    multiple_choice_answer,
    multiple_choice_question,
)

# choices that are translated by this table if a record has no others
FIXED_CHOICES = {"yes": "نعم", "no": "لا", "maybe": "ربما", "true": "صواب", "false": "خطأ"}

_HAS_WORD = re.compile(r"[^\W\d_]{2,}")  # two letters in a row; 12.5, B and + need no translation
_MARKUP = re.compile(
    r"</?(?:a|b|br|code|div|em|h[1-6]|i|li|ol|p|pre|span|strong|su[bp]|t[dhr]|table|tbody|thead|u|ul)\b[^<>]*>"
    r"|https?://[^\s<>)\]]+|www\.[^\s<>)\]]+|```|\*\*|__|\{\{?\w+\}?\}",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"^[ \t]*(?:[-*•–]|\d{1,2}[.)-])[ \t]", re.MULTILINE)


@dataclass(frozen=True)
class Segment:
    """A text to translate; `role` describes its place in the record to the model."""

    id: str
    role: str
    text: str


@dataclass(frozen=True)
class Frame:
    """A split record. `turns` lists pieces in order: ("text", copied unchanged) or ("segment", id to translate)."""

    record: Record
    segments: tuple[Segment, ...]
    turns: tuple[tuple[tuple[str, str], ...], ...]
    choices: tuple[tuple[str, str], ...] | None
    question: str | None  # id of the segment whose text is provenance["question"]

    def rebuild(self, texts: dict[str, str], provenance: dict[str, Any]) -> Record:
        """The Arabic record with `texts` (segment id -> Arabic) in the frame and `provenance` added to the source's.

        Raises:
            pydantic.ValidationError: a text is blank.
        """
        record = self.record
        values = ["".join(texts[text] if kind == "segment" else text for kind, text in turn) for turn in self.turns]
        turns = tuple(
            Turn(speaker=turn.speaker, value=value, learned=turn.learned)
            for turn, value in zip(record.conversations, values, strict=True)
        )
        own = {**record.provenance, **provenance}
        if self.question is not None:
            own["question"] = texts[self.question]
        return Record(
            id=f"{record.id}/ar",
            language="ar",
            kind=record.kind,
            source=record.source,
            licence=record.licence,
            specialty=record.specialty,
            split=record.split,
            conversations=turns,
            choices=None
            if self.choices is None
            else tuple(texts[text] if kind == "segment" else text for kind, text in self.choices),
            answer=record.answer,
            provenance=own,
        )


class _Parts:
    """Collects segments; a text that occurs twice in a record is translated once."""

    def __init__(self) -> None:
        self.segments: dict[tuple[str, str], Segment] = {}

    def piece(self, name: str, role: str, text: str) -> list[tuple[str, str]]:
        """`text` as pieces: a segment and the white space around it, or the text itself if it has no words."""
        core = text.strip()
        if not _HAS_WORD.search(core):
            return [("text", text)] if text else []
        start = text.index(core)
        segment = self.segments.setdefault((role, core), Segment(name, role, core))
        around = [("text", text[:start]), ("segment", segment.id), ("text", text[start + len(core) :])]
        return [piece for piece in around if piece[1]]


def split_record(record: Record) -> Frame:
    """The segments and the frame of an English record."""
    parts = _Parts()
    choices = _choices(record, parts)
    turns = []
    question: str | None = None
    for number, turn in enumerate(record.conversations, start=1):
        if turn.language == "ar":
            turns.append((("text", turn.value),))
        elif turn.speaker == "human" and choices is not None:
            turns.append(tuple(_asking(record, turn.value, number, choices, parts)))
        elif turn.speaker == "gpt" and choices is not None:
            turns.append(tuple(_answering(record, turn.value, number, choices, parts)))
        else:
            role = {"human": "question or patient's turn", "gpt": "answer or doctor's turn", "system": "instruction"}
            turns.append(tuple(_with_question(record, turn, f"t{number}", role[turn.speaker], parts)))
    asked = record.provenance.get("question")
    for segment in parts.segments.values():
        if segment.text == str(asked or "").strip():
            question = segment.id
    found = tuple(parts.segments.values())
    return Frame(record, found, tuple(turns), None if choices is None else tuple(choices), question)


def _choices(record: Record, parts: _Parts) -> list[tuple[str, str]] | None:
    if record.choices is None:
        return None
    if all(choice.casefold() in FIXED_CHOICES for choice in record.choices):
        return [("text", FIXED_CHOICES[choice.casefold()]) for choice in record.choices]
    found = []
    for letter, choice in zip(LETTERS, record.choices, strict=False):
        if _HAS_WORD.search(choice):
            segment = Segment(f"choice{letter}", f"choice {letter}", choice.strip())
            parts.segments[segment.role, segment.text] = segment
            found.append(("segment", segment.id))
        else:
            found.append(("text", choice))
    return found


def _asking(
    record: Record, value: str, number: int, choices: list[tuple[str, str]], parts: _Parts
) -> list[tuple[str, str]]:
    """The human turn of a record with choices: its question, then the lettered choices if the turn ends with them."""
    assert record.choices is not None
    listed = multiple_choice_question("", record.choices)
    turn = Turn.model_validate({"from": "human", "value": value})
    if not value.endswith(listed) or value == listed:
        return _with_question(record, turn, f"t{number}", "question", parts)
    stem = Turn.model_validate({"from": "human", "value": value.removesuffix(listed)})
    pieces = _with_question(record, stem, f"t{number}", "question", parts)
    for letter, choice in zip(LETTERS, choices, strict=False):
        pieces += [("text", f"\n{letter}. "), choice]
    return pieces


def _answering(
    record: Record, value: str, number: int, choices: list[tuple[str, str]], parts: _Parts
) -> list[tuple[str, str]]:
    """The gpt turn of a record with choices: `Answer: B. <choice>` or `Answer: <choice>` and what follows."""
    assert record.choices is not None
    assert record.answer is not None
    lettered = multiple_choice_answer(record.choices, record.answer, "en")
    bare = f"{ANSWER_PREFIX['en']}{record.choices[record.answer]}"
    for opening, letter in ((lettered, f"{LETTERS[record.answer]}. "), (bare, "")):
        rest = value.removeprefix(opening)
        if value.startswith(opening) and (not rest or rest[0] == "\n"):
            key = [("text", f"{ANSWER_PREFIX['ar']}{letter}"), choices[record.answer]]
            return key + parts.piece(f"t{number}", "explanation of the answer", rest)
    return parts.piece(f"t{number}", "answer", value)


def _with_question(record: Record, turn: Turn, name: str, role: str, parts: _Parts) -> list[tuple[str, str]]:
    """A turn as one segment, or as two if it ends with the question in the provenance (PubMedQA)."""
    asked = record.provenance.get("question")
    before = turn.value.removesuffix(asked) if isinstance(asked, str) and asked.strip() else turn.value
    if turn.speaker != "human" or before == turn.value or not before:
        return parts.piece(name, role, turn.value)
    return [
        *parts.piece(f"{name}context", "context of the question", before),
        *parts.piece(name, "question", str(asked)),
    ]


def why_incomplete(frame: Frame, texts: dict[str, str], repeated: int) -> str | None:
    """Why a reply does not translate each segment exactly once, or None."""
    wanted = {segment.id for segment in frame.segments}
    if repeated:
        return f"{repeated} segment ids are repeated"
    if missing := sorted(wanted - set(texts)):
        return f"segments are missing: {', '.join(missing)}"
    if unknown := sorted(set(texts) - wanted):
        return f"there is no segment {unknown[0]}"
    blank = sorted(name for name, text in texts.items() if not text.strip())
    return f"segments are blank: {', '.join(blank)}" if blank else None


def lost_markup(frame: Frame, texts: dict[str, str]) -> list[str]:
    """Lost and added HTML, Markdown, URLs, placeholders and list marks: one sentence for each segment with any."""
    found = []
    for segment in frame.segments:
        before = Counter(mark.rstrip(".,;:") for mark in _MARKUP.findall(segment.text))
        after = Counter(mark.rstrip(".,;:،؛") for mark in _MARKUP.findall(texts[segment.id]))
        lost, added = before - after, after - before
        marks = [f"lost {mark}" for mark in sorted(lost)] + [f"added {mark}" for mark in sorted(added)]
        lines = (len(_LIST_MARK.findall(segment.text)), len(_LIST_MARK.findall(texts[segment.id])))
        if lines[0] != lines[1]:
            marks.append(f"{lines[0]} list items became {lines[1]}")
        if marks:
            found.append(f"markup ({segment.role}): {'; '.join(marks)}")
    return found
