"""The option that a generated answer names, in English and Arabic: its letter, or else its text.

Task files name `bimedix_jax.evals.extraction.letters` as a filter. What names no option, or several, is wrong.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LATIN = "ABCDEF"
ABJAD = "أبجدهو"
INVALID = "[invalid]"
"""What stands for an answer that names no option."""

_MARKS = re.compile("[\u064b-\u0652\u0640\u200e\u200f\u202a-\u202e]")  # vowel signs, stretching, direction
_CUE = re.compile(
    r"(?:answer|choice|option|الإجابة الصحيحة|الجواب الصحيح|الإجابة|الاجابة|الجواب|الخيار)"
    r"\s*(?:is|هي|هو)?\s*[:：]?\s*(?:option|الخيار|الحرف)?\s*",
    re.IGNORECASE,
)
_LETTER = r"[(\[«\"'*]*([A-Fa-f]|[أاإبجدهو])[)\]».:،,\"'*-]*(?=\s|$)"
_START = re.compile(rf"\W*?{_LETTER}")
_SEVERAL = re.compile(r"\W*([A-Fa-f]|[أاإبجدهو])\W*(?:or|and|/|,|&|\+|أو|و)\W*([A-Fa-f]|[أاإبجدهو])(?=\W|$)")
_ALONE = re.compile(rf"(?:(?<=\s)|^){_LETTER}")


def letters(resps: Iterable[Sequence[Any]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For lm-evaluation-harness: the letter that each response names."""
    return [
        [letter_of(answer if isinstance(answer, str) else "", doc["choices"]) for answer in answers]
        for answers, doc in zip(resps, docs, strict=True)
    ]


def letter_of(answer: str, choices: Sequence[str]) -> str:
    """The Latin letter of the option that an answer names, INVALID if it names none or several.

    In this order: a letter after "answer" or "الإجابة", a letter at the beginning, one option's text, one letter that
    stands alone.
    """
    text = plain(answer)
    if _SEVERAL.match(text):
        return INVALID
    found = [_index(match[1], len(choices)) for cue in _CUE.finditer(text) if (match := _START.match(text, cue.end()))]
    if found and found[0] is not None:
        return LATIN[found[0]]
    first = _START.match(text)
    if first and not _is_word(first, text) and (index := _index(first[1], len(choices))) is not None:
        return LATIN[index]
    index = _by_text(text, [plain(choice) for choice in choices])
    if index is not None:
        return LATIN[index]
    alone = {_index(match[1], len(choices)) for match in _ALONE.finditer(text) if not _is_word(match, text)} - {None}
    return LATIN[alone.pop() or 0] if len(alone) == 1 else INVALID


def plain(text: str) -> str:
    """Without vowel signs and stretching, in one Unicode form, with single spaces."""
    return " ".join(_MARKS.sub("", unicodedata.normalize("NFKC", text)).split())


def _index(letter: str, count: int) -> int | None:
    letter = letter.upper().replace("ا", "أ").replace("إ", "أ")
    letters = LATIN if letter in LATIN else ABJAD
    index = letters.index(letter)
    return index if index < count else None


def _is_word(match: re.Match[str], text: str) -> bool:
    """Whether a letter is rather a word: the article `a`, `و` (and), or a small letter in a sentence."""
    rest = text[match.end() :].strip()
    bare = match[0].strip() == match[1]
    return bool(rest) and bare and match[1] in "Aabcdefو" and rest[:1].isalpha()


def _by_text(text: str, choices: Sequence[str]) -> int | None:
    """The option whose text occurs as words; of those that contain each other, the longest."""
    folded = text.casefold()
    hits = [
        index
        for index, choice in enumerate(choices)
        if choice and re.search(rf"(?<!\w){re.escape(choice.casefold())}(?!\w)", folded)
    ]
    pairs = [(index, other) for index in hits for other in hits if choices[index] != choices[other]]
    inside = {index for index, other in pairs if choices[index] in choices[other]}
    longest = [index for index in hits if index not in inside]
    if len(longest) == 1:
        return longest[0]
    begun = folded.lstrip(" .:")  # "yes, but no side effects"
    starts = [index for index in longest if re.match(rf"{re.escape(choices[index].casefold())}\s*[,.;:،؛]", begun)]
    return starts[0] if len(starts) == 1 else None
