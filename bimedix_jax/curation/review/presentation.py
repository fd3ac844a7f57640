"""How an item is shown to a reviewer, for all formats."""

import html
import re
from collections.abc import Mapping

from bimedix_jax.curation.review.items import ReviewItem
from bimedix_jax.curation.review.segments import Segment, segments
from bimedix_jax.errors import BimedixError

_MARK = re.compile(r"^[ \t\u200e\u200f]*\[\[[ \t]*([^\]\n]+?)[ \t]*\]\][ \t\u200e\u200f]*$", re.MULTILINE)
_CELL = "vertical-align: top; padding: 6px; border-top: 1px solid #999; white-space: pre-wrap"


def side_by_side(item: ReviewItem, blind: bool) -> str:
    """A table in HTML: English from left to right, Arabic from right to left, a row for each segment.

    `blind` hides the score, the flags and the reason for review.
    """
    rows = "".join(
        f'<tr><td style="{_CELL}"><small>{html.escape(part.id)} · {html.escape(part.role)}</small></td>'
        f'<td dir="ltr" lang="en" style="{_CELL}; direction: ltr; text-align: left">{html.escape(part.source)}</td>'
        f'<td dir="rtl" lang="ar" style="{_CELL}; direction: rtl; text-align: right; font-size: 1.1em">'
        f"{html.escape(part.translation)}</td></tr>"
        for part in segments(item)
    )
    table = f'<table style="width: 100%; border-collapse: collapse">{rows}</table>'
    return table if blind else "".join(f"<p>{html.escape(line)}</p>" for line in machine(item)) + table


def machine(item: ReviewItem) -> list[str]:
    """Reason for review, score and flags."""
    score = "none" if item.score is None else f"{item.score:g}"
    return [f"reason: {item.reason}", f"score: {score}", *map(str, item.flags)]


def editable(parts: list[Segment]) -> str:
    """The translations as one text, each under its mark `[[id]]`."""
    return "\n".join(f"[[{part.id}]]\n{part.translation}" for part in parts)


def changes(text: str, item: ReviewItem) -> dict[str, str]:
    """The segments that an edited text of `editable` changes.

    Raises:
        BimedixError: a mark is missing, unknown or repeated, or there is text before the first one.
    """
    pieces = _MARK.split(text)
    names, texts = pieces[1::2], pieces[2::2]
    wanted = {part.id: part.translation for part in segments(item)}
    if pieces[0].strip():
        raise BimedixError(f"item {item.id!r}: the edited text must begin with [[{next(iter(wanted), '')}]]")
    if sorted(names) != sorted(wanted):
        raise BimedixError(
            f"item {item.id!r}: the edited text has the marks {', '.join(names) or 'none'}; it needs each of "
            f"{', '.join(wanted)} once"
        )
    return changed(dict(zip(names, texts, strict=True)), wanted)


def changed(texts: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """The texts that differ from `before`, apart from white space around them."""
    return {name: text.strip() for name, text in texts.items() if text.strip() != before.get(name, "").strip()}
