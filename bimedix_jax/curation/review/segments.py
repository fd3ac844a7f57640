"""An item as pairs of texts, which a reviewer reads side by side and can edit one by one."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from bimedix_jax.curation.review.items import ReviewItem
from bimedix_jax.curation.structure import Frame, split_record
from bimedix_jax.data.records import Record, explain
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Segment:
    """One text of an item; `translation` is empty if there is none."""

    id: str
    role: str
    source: str
    translation: str


def segments(item: ReviewItem) -> list[Segment]:
    """The item's texts in order, without the structure of the record (letters, answer key).

    Raises:
        BimedixError: the translation does not have the structure of its source.
    """
    frame = split_record(item.source)
    texts = {} if item.translation is None else _texts(item.id, frame, item.translation)
    return [Segment(part.id, part.role, part.text, texts.get(part.id, "")) for part in frame.segments]


def digest(item: ReviewItem) -> str:
    """A hash of the texts in 16 letters. It reveals verdicts that belong to an earlier translation.

    It has no digits: a spreadsheet takes 1234567890123456 and 12345e67 for numbers, and rounds them.
    """
    return _hexadecimal(item).translate(_LETTERS)


def has_digest(item: ReviewItem, seen: object) -> bool:
    """Whether a digest is that of the item: as `digest` writes it, or in hexadecimal, as earlier versions did."""
    return seen in (digest(item), _hexadecimal(item))


_LETTERS = str.maketrans("0123456789abcdef", "ghjkmnpqrsabcdxy")  # no e, i, l, o and f: no number, no word, no date


def _hexadecimal(item: ReviewItem) -> str:
    seen = "\0".join(f"{part.id}\0{part.source}\0{part.translation}" for part in segments(item))
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def with_edits(item: ReviewItem, edited: dict[str, str], provenance: dict[str, Any]) -> Record:
    """The translation with changed segments in the frame of its source.

    Raises:
        BimedixError: a segment is unknown, or one has no text at all.
    """
    parts = segments(item)
    unknown = sorted(set(edited) - {part.id for part in parts})
    if unknown:
        raise BimedixError(
            f"item {item.id!r} has no segment {unknown[0]!r}; it has {', '.join(part.id for part in parts)}"
        )
    texts = {part.id: edited.get(part.id, part.translation).strip() for part in parts}
    missing = [name for name, text in texts.items() if not text]
    if missing:
        raise BimedixError(f"item {item.id!r}: segment {missing[0]!r} has no translation; write one or reject the item")
    own = {} if item.translation is None else item.translation.provenance
    try:
        rebuilt = split_record(item.source).rebuild(texts, {**own, **provenance})
    except ValidationError as error:
        raise BimedixError(f"item {item.id!r}: {explain(error)}; correct the edited text") from error
    return rebuilt if item.translation is None else rebuilt.model_copy(update={"id": item.translation.id})


def _texts(name: str, frame: Frame, translation: Record) -> dict[str, str]:
    """Segment id -> Arabic text, found by matching the frame with the translated record."""
    found: dict[str, str] = {}
    for piece, choice in zip(frame.choices or (), translation.choices or (), strict=False):
        if piece[0] == "segment":
            found[piece[1]] = choice
    for pieces, turn in zip(frame.turns, translation.conversations, strict=True):
        groups: dict[str, str] = {}
        pattern = "".join(_pattern(kind, text, found, groups) for kind, text in pieces)
        match = re.fullmatch(pattern, turn.value, re.DOTALL)
        if match is None:
            raise BimedixError(
                f"item {name!r}: the translation does not have the structure of its source (letters of the choices, "
                "text around them); translate it again"
            )
        found.update({groups[group]: text.strip() for group, text in match.groupdict().items()})
    return found


def _pattern(kind: str, text: str, found: dict[str, str], groups: dict[str, str]) -> str:
    if kind == "text":
        return re.escape(text)
    if text in found:
        return re.escape(found[text])
    known = next((group for group, segment in groups.items() if segment == text), None)
    if known is not None:
        return f"(?P={known})"
    groups[f"s{len(groups)}"] = text
    return f"(?P<s{len(groups) - 1}>.+?)"
