"""The choices of a question in the forms in which data sets have them: texts in order, with their labels if any.

    ["Liver", "Spleen"]                              ["A. Liver", "B. Spleen"]
    {"A": "Liver", "B": "Spleen"}                    {"text": ["Liver", "Spleen"], "label": ["A", "B"]}
    [{"label": "A", "text": "Liver"}, ...]           [{"aid": 1, "atext": "Liver"}, ...]
    "(A) Liver (B) Spleen"                           "أ) الكبد ب) الطحال"
    one column for each choice                       any of these as JSON or as a Python list in a cell of a table

Empty choices at the end are no choices. One in the middle stays and makes the row invalid.
"""

import ast
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bimedix_jax.curation.readers.texts import KeptText, is_missing, kept, says_none

TEXT_NAMES = ("text", "value", "content", "option", "choice", "answer", "atext", "option_text", "choice_text", "name")
LABEL_NAMES = ("label", "key", "letter", "id", "aid", "idx", "index", "number", "option_id", "choice_id")

LATIN = "ABCDEFGHIJ"
ABJAD = "أبجدهوزحطي"
ALPHABET = "أبتثجحخدذر"
"""Arabic letters in the order in which exams letter their choices, and in that of the alphabet."""

_SAME_LETTER = str.maketrans("اإآٱﺍﺃﻫہۀة٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", "أأأأأأهههه01234567890123456789")
_NAMED = re.compile(r"(?:option|opt|op|choice|answer|ans|الخيار|خيار|الإجابة|الاختيار)[\s_-]*(.+)", re.IGNORECASE)
_AROUND = " \t\r\n()[]{}.:-–،,)\"'؛\u0640\u200e\u200f\u200c\u200d"


@dataclass(frozen=True)
class Choices:
    """The choices of one question.

    Attributes:
      texts: in order.
      labels: of the same length, or empty; as `label_of` writes them.
      stem: the text before the first choice, if one text held both.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    stem: str = ""


def label_of(value: object) -> str:
    """One spelling of a label: `(A)`, `a.`, `Option A` and `opa` are `A`; `٢` is `2`; `ا` is `أ`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text[:1] == "-" and text[1:].isdecimal():
        return text
    text = text.strip(_AROUND).translate(_SAME_LETTER)
    named = _NAMED.fullmatch(text)
    inner = named[1].strip(_AROUND) if named else text
    return inner.upper() if len(inner) == 1 or inner.isdecimal() else text


def choices_of(value: Any) -> Choices:
    """The choices in one field.

    Raises:
        ValueError: it holds no choices in a form that is known.
    """
    if is_missing(value) or value == "":
        raise ValueError("the choices are missing")
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, dict):
        return _from_object(value)
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, dict) for item in value):
            return _from_objects(list(value))
        return _without_own_labels(_present(value))
    raise ValueError("the choices are neither a list, an object nor a text with labels")


def choices_in_columns(names: Sequence[str], values: Sequence[Any]) -> Choices:
    """The choices of a row with a column for each. Names of columns are labels.

    Those that contain a number are labels as they are: whether 2 is the column `choice2` is not known, since numbers
    may count from 0.
    """
    labels = [label_of(name) for name in names]
    if any(label.isdecimal() for label in labels) or len(set(labels)) < len(labels):
        labels = ["" if name.strip().isdecimal() else name.strip().casefold() for name in names]
    return _without_own_labels(_present(values, labels))


def _text(value: Any) -> str:
    if is_missing(value) and not says_none(value):  # None of the others may be a choice
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("a choice is not a text")
    return value


def _present(values: Sequence[Any], labels: Iterable[str] | None = None) -> Choices:
    """The choices that a data set gives one by one, without the missing ones at the end."""
    found = _trimmed([_text(value) for value in values], labels)
    for value, text in zip(values, found.texts, strict=False):
        if not text and isinstance(value, str) and value.strip():
            raise ValueError(
                f"the choice {value.strip()!r} is read as a missing value; missing=keep reads it as a text"
            )
    return found


def _trimmed(texts: list[str], labels: Iterable[str] | None = None) -> Choices:
    """Choices without the empty ones at the end."""
    number = len(texts)
    while number and not texts[number - 1].strip():
        number -= 1
    return Choices(tuple(texts[:number]), () if labels is None else tuple(labels)[:number])


def _from_object(value: dict[str, Any]) -> Choices:
    for texts, labels in ((a, b) for a in TEXT_NAMES for b in LABEL_NAMES):
        if isinstance(value.get(texts), list) and isinstance(value.get(labels), list):
            if len(value[texts]) != len(value[labels]):
                raise ValueError("the choices have more or fewer labels than texts")
            return _present(value[texts], [label_of(label) for label in value[labels]])
    for name in TEXT_NAMES:
        if isinstance(value.get(name), list):
            return _present(value[name])
    found = {label_of(name): text for name, text in value.items()}
    ordered = _order(list(found))
    if ordered is None or len(found) != len(value):
        raise ValueError("the choices are an object whose keys are not consecutive labels such as A, B, C")
    return _present([found[label] for label in ordered], ordered)


def _order(labels: Sequence[str]) -> list[str] | None:
    """Labels in order, if they are consecutive ones of a sequence from its first."""
    for sequence in _sequences():
        if set(labels) == set(sequence[: len(labels)]):
            return list(sequence[: len(labels)])
    return None


def _sequences() -> list[list[str]]:
    numbers = [str(number) for number in range(11)]
    return [list(LATIN), list(ABJAD), list(ALPHABET), numbers[1:], numbers[:-1]]


def _from_objects(items: list[dict[str, Any]]) -> Choices:
    text = next((name for name in TEXT_NAMES if all(name in item for item in items)), None)
    if text is None:
        if all(len(item) == 1 for item in items):  # [{"A": "Liver"}, {"B": "Spleen"}]
            return _from_object({name: value for item in items for name, value in item.items()})
        raise ValueError("the choices are objects without a text")
    label = next((name for name in LABEL_NAMES if all(name in item for item in items)), None)
    labels = None if label is None else [label_of(item[label]) for item in items]
    if labels is not None and len(set(labels)) < len(labels):
        raise ValueError("two choices have the same label")
    return _present([item[text] for item in items], labels)


def _from_text(text: str) -> Choices:
    plain = _ARRAY.sub(r"\1", text.strip())
    if plain[:1] in "[{(" and plain[-1:] in "]})":
        found = _literal(plain)
        if isinstance(found, list | dict):
            return choices_of(kept(found) if isinstance(text, KeptText) else found)
    labelled = split_labelled(plain)
    if labelled is None:
        raise ValueError("the choices are one text without labels such as (A), A. or أ)")
    if labelled.stem:
        raise ValueError("the choices begin with a text that has no label")
    return labelled


def _literal(text: str) -> object:
    """The list or object that a text spells in JSON, in Python, or as numpy prints it; None if it spells none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    strings = [first or second for first, second in _STRING.findall(text)]
    if text[0] == "[" and len(strings) > 1 and not _STRING.sub("", text).strip("[] \t\r\n"):
        return strings  # Python would join ['Liver' 'Spleen']
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return list(found) if isinstance(found, tuple) else found


_ARRAY = re.compile(r"array\((\[.*?\])(?:,\s*dtype=[^)]*)?\)", re.DOTALL)
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")

_MARKS = (r"\(\s*{}\s*\)", r"\[\s*{}\s*\]", r"{}\s*\)", r"{}\.(?!\d)", r"{}\s*:", r"{}\s*[-–](?=\s)")
_BEFORE = r"(?:(?<=^)|(?<=[\s,;،؛|/]))"
_MAY_BE_LABELLED = re.compile(r"\s*[(\[]?\s*\w\u0640?\s*[)\].:–-]")


@functools.cache  # a few hundred patterns, more than `re` keeps
def _pattern(mark: str, label: str, place: str) -> re.Pattern[str]:
    spelled = {"أ": "[أاإ]", "ه": "ه\u0640?"}.get(label, label)
    if label.isdecimal():
        digits = "".join(f"[{digit}{chr(ord('٠') + int(digit))}]" for digit in label)
        return re.compile(place + mark.format(digits) + (r"" if ")" in mark or "]" in mark else r"(?=\s)"))
    return re.compile(place + mark.format(spelled))


def _spellings() -> list[list[str]]:
    return [list(LATIN), list(LATIN.lower()), list(ABJAD), list(ALPHABET), [str(number) for number in range(1, 11)]]


def split_labelled(text: str) -> Choices | None:
    """The stem and the choices of a text such as `Where? (A) Liver (B) Spleen`; None if it has no two labels in order.

    The form of label and the sequence (A B C, أ ب ج, 1 2 3) with the most choices is used; a line break before a label
    counts before any other place.

    Raises:
        ValueError: a label occurs more than once, as in `Hepatitis A. is viral. A. Aspirin B. Statin`, and the text can
            be split in several ways.
    """
    best: Choices | None = None
    places: tuple[str, ...] = ()
    for place in (r"(?m:^)\s*", _BEFORE):
        for mark in _MARKS:
            for labels in _spellings():
                found = _cut(text, mark, labels, place)
                if found is not None and (best is None or len(found[0].texts) > len(best.texts)):
                    best, places = found
    if best is not None and places:
        raise ValueError(
            f"the label {places[0]} of a choice occurs more than once, so the choices can be split in several ways"
        )
    return best


def _cut(text: str, mark: str, labels: list[str], place: str) -> tuple[Choices, tuple[str, ...]] | None:
    """The choices, and the labels that may be at another place as well."""
    cuts: list[tuple[int, int]] = []
    for label in labels:
        match = _pattern(mark, label, place).search(text, cuts[-1][1] if cuts else 0)
        if match is None:
            break
        cuts.append(match.span())
    if len(cuts) < 2:
        return None
    patterns = [_pattern(mark, label, place) for label in labels[: len(cuts)]]
    runs = _runs(text, [[match.span() for match in pattern.finditer(text)] for pattern in patterns])
    cuts = runs[0] if runs else cuts
    unsure = tuple(label for label, *spans in zip(labels, *runs, strict=False) if len(set(spans)) > 1)
    ends = [start for start, _ in cuts[1:]] + [len(text)]
    texts = [text[start:end].strip() for (_, start), end in zip(cuts, ends, strict=True)]
    if all(item.endswith((",", ";", "،", "؛", "|", "/")) for item in texts[:-1]):
        texts = [item.rstrip(",;،؛|/ ") if item is not texts[-1] else item for item in texts]
    found = _trimmed(texts, [label_of(label) for label in labels[: len(texts)]])
    stem = text[: cuts[0][0]].strip()
    return (Choices(found.texts, found.labels, stem), unsure) if len(found.texts) > 1 else None


def _runs(text: str, places: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Up to two ways to take one place of each label, in order, with a text after each."""
    runs = [[span] for span in places[0]]
    for spans in places[1:]:
        longer = []
        for start, end in spans:
            fitting = [run for run in runs if run[-1][1] <= start and text[run[-1][1] : start].strip(_AROUND)]
            longer += [[*run, (start, end)] for run in fitting[:2]]
        runs = longer
    return ([run for run in runs if text[run[-1][1] :].strip(_AROUND)] or runs)[:2]


def _without_own_labels(found: Choices) -> Choices:
    """Choices whose texts all begin with their labels in order, as in `A. Liver`, without these."""
    if len(found.texts) < 2 or not _MAY_BE_LABELLED.match(found.texts[0]):
        return found
    for mark in _MARKS:
        for labels in _spellings():
            pairs = list(zip(labels, found.texts, strict=False))
            matches = [_pattern(mark, label, r"\s*").match(text) for label, text in pairs]
            if len(pairs) == len(found.texts) and all(
                match and text[match.end() :].strip() for match, (_, text) in zip(matches, pairs, strict=True)
            ):
                texts = [text[match.end() :].strip() for match, (_, text) in zip(matches, pairs, strict=True) if match]
                return Choices(tuple(texts), tuple(label_of(label) for label, _ in pairs))
    return found
