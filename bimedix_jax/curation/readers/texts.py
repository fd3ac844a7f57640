"""What stands in a field instead of a text: missing values, placeholder answers, and the markup around a text."""

import html
import re
from collections.abc import Mapping
from typing import Any

from bimedix_jax.curation.accounting import SourceAccount

# what pandas, R, SQL and spreadsheets write for an empty cell, and Alpaca's marks of an empty input. "None" is what
# Python's str() makes of it; "none" is an answer, as to a question about allergies
MISSING = {"nan", "NaN", "NAN", "null", "NULL", "Null", "None", "NA", "N/A", "n/a", "N/a", "#N/A", "#N/A N/A", "<NA>"}
MISSING |= {"\\N", "NaT", "nil", "NIL", "undefined", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!"}
_MARK_OF_NOTHING = re.compile(r"<\s*no\s*(?:chat)?[_ ]?(?:input|output|answer|value)\s*>", re.IGNORECASE)

PLACEHOLDERS = {
    "no answer", "no answers", "no answer available", "no answers available", "no answer yet", "no answers yet",
    "no answer found", "no answers found", "no answer provided", "no answer given", "not answered", "unanswered",
    "no reply", "no replies", "no output", "no data", "no text", "not available", "not applicable", "not provided",
    "unavailable", "n.a", "n/a", "na", "tbd", "tba", "todo", "to be added", "placeholder", "[deleted]", "[removed]",
    "(no answer)", "lorem ipsum",
    "لا توجد إجابة", "لا توجد اجابة", "لا توجد إجابات", "لا توجد اجابات", "لا يوجد جواب", "لا توجد أجوبة", "لا يوجد رد",
    "لا توجد ردود", "لم تتم الإجابة", "لم يتم الرد", "بدون إجابة", "بدون جواب", "بلا إجابة", "غير متوفر", "غير متوفرة",
    "غير متاح", "غير متاحة", "لا إجابة", "لا جواب",
}  # fmt: skip
"""Answers that say only that there is none, in lower case."""

_NOTHING = re.compile(r"[-–—_.…*/\s]+")  # such as "-", "...", "//"
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,30});", re.IGNORECASE)
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style|head|iframe)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_ATTRIBUTES = r"""(?:\s+[a-z_:@][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+))*\s*/?"""
_BLOCKS = "address|article|blockquote|br|dd|div|dl|dt|figure|footer|form|h[1-6]|header|hr|main|nav|ol|p|pre|section"
_BLOCKS += "|table|tbody|tfoot|thead|tr|ul"
_INLINE = (
    "a|abbr|acronym|b|big|body|button|center|cite|code|del|em|font|html|i|iframe|img|input|ins|kbd|label|link|mark"
)
_INLINE += "|meta|nobr|noscript|picture|q|s|samp|script|small|source|span|strike|strong|style|svg|tt|u|var|video|wbr"
_BLOCK = re.compile(rf"(?:\s*</?(?:{_BLOCKS}|li){_ATTRIBUTES}>)+\s*", re.IGNORECASE)
_ITEM = re.compile(rf"(?:\s*</li\s*>)?\s*<li{_ATTRIBUTES}>\s*", re.IGNORECASE)
_CELL = re.compile(rf"(?:\s*</?t[dh]{_ATTRIBUTES}>)+\s*", re.IGNORECASE)
_SPAN = re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}>", re.IGNORECASE)
_SCRIPTS = re.compile(rf"<(su[bp]){_ATTRIBUTES}>(.*?)</\1\s*>", re.IGNORECASE | re.DOTALL)


class KeptText(str):
    """A text that is never missing, whatever its words are."""

    __slots__ = ()


def kept(value: Any) -> Any:
    """The same value with each text in it, at any depth, as a `KeptText`."""
    if isinstance(value, dict):
        return {name: kept(item) for name, item in value.items()}
    if isinstance(value, list):
        return [kept(item) for item in value]
    return KeptText(value) if isinstance(value, str) else value


def is_missing(value: object) -> bool:
    """Whether a field has no value: none at all, NaN, or a text that a program wrote for it. Blank is not missing."""
    if value is None or value != value:  # NaN differs from itself
        return True
    text = value.strip() if isinstance(value, str) and not isinstance(value, KeptText) else ""
    return text in MISSING or _MARK_OF_NOTHING.fullmatch(text) is not None


def says_none(value: object) -> bool:
    """Whether a text is the word None, which may be an answer or a choice."""
    return isinstance(value, str) and value.strip() == "None"


def is_placeholder(text: str) -> bool:
    """Whether an answer says only that there is no answer, or consists of dots and dashes."""
    plain = " ".join(text.casefold().split()).rstrip(".!؟? ")
    return plain in PLACEHOLDERS or bool(text.strip() and _NOTHING.fullmatch(text))


def without_html(text: str) -> str:
    """A text without HTML: line breaks for blocks, characters for entities. `p < 0.05` and `<noinput>` stay.

    Only names of HTML elements are tags. Exponents and indices keep a mark, since 10<sup>2</sup> is not 102.
    """
    text = _without_tags(text)
    if "&" not in text:
        return text
    return _without_tags(_ENTITY.sub(lambda match: html.unescape(match[0]), text))  # &lt;p&gt; was a tag, too


def _without_tags(text: str) -> str:
    if "<" not in text:
        return text
    text = _HIDDEN.sub(" ", text)
    text = _SCRIPTS.sub(lambda match: ("^" if match[1].lower() == "sup" else "_") + match[2], text)
    text = _CELL.sub(" ", _BLOCK.sub("\n", _ITEM.sub("\n- ", text)))
    return _SPAN.sub("", text)


def cleaned(fields: Mapping[str, Any], account: SourceAccount) -> dict[str, Any]:
    """The fields of a row without HTML in any of their texts. Counts the texts that changed."""
    return {name: _cleaned(value, account) for name, value in fields.items()}


def _cleaned(value: Any, account: SourceAccount) -> Any:
    if isinstance(value, str):
        if "<" not in value and "&" not in value:
            return value
        found = without_html(value)
        if found != value:
            account.changes["texts without their HTML (html=keep leaves it in)"] += 1
        return found
    if isinstance(value, dict):
        return {name: _cleaned(item, account) for name, item in value.items()}
    return [_cleaned(item, account) for item in value] if isinstance(value, list) else value
