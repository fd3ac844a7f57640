"""Numbers that are lost or invented in a translation, in digits or in words.

A number has a set of possible values ("readings"), since authors write numbers differently: `1,000` is 1000 or 1.0,
`5 million` is 5 or 5,000,000, `خمسة وعشرون` is 25 or the two numbers 5 and 20. Two numbers match if they have a common
reading.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bimedix_jax.curation.arabic import plain
from bimedix_jax.curation.checks import number_words
from bimedix_jax.curation.checks.flags import Flag

# digits with separators; a no-break or thin space can separate groups of digits, an ordinary space cannot
TOKEN = re.compile(r"\d+(?:[.,،'\u00a0\u202f\u2009]\d+)*")
_ROMAN = re.compile(r"(?<!\w)(I|II|III|IV|V|VI|VII|VIII|IX|X|XI|XII)(?![\w'])")
_ROMAN_VALUE = {name: value + 1 for value, name in enumerate("I II III IV V VI VII VIII IX X XI XII".split())}
_FRACTIONS = {"½": 0.5, "¼": 0.25, "¾": 0.75, "⅓": 1 / 3, "⅔": 2 / 3}
_SCALE = re.compile(r"[\s\u00a0\-]*(\w+)")


@dataclass(frozen=True)
class Number:
    """A number as written, its start and end in the text, and its readings."""

    text: str
    readings: frozenset[float]
    start: int
    end: int
    decade: bool = False  # "1960s", "ستينيات": a decade, with or without the century
    optional: bool = False  # part of a name (the 0 of R0), which translators may spell out

    def same(self, other: "Number") -> bool:
        """Whether the two numbers match."""
        if self.readings & other.readings:
            return True
        if self.decade or other.decade:
            return bool({value % 100 for value in self.readings} & {value % 100 for value in other.readings})
        return False


def in_digits(text: str) -> list[Number]:
    """Numbers written in digits, in order. `text` must be the result of `plain`."""
    found = []
    for match in TOKEN.finditer(text):
        readings = set(_readings(match.group()))
        scale = _SCALE.match(text, match.end())
        factor = number_words.scale(scale.group(1)) if scale else None
        if factor:
            readings |= {value * factor for value in readings}
        short_year = re.compile(r"(\d\d)\d\d[-–/]$").search(text, max(0, match.start() - 5), match.start())
        if short_year and len(match.group()) == 2:  # 1918-19
            readings.add(float(short_year.group(1) + match.group()))
        after_letter = match.start() > 0 and text[match.start() - 1].isascii() and text[match.start() - 1].isalpha()
        found.append(
            Number(
                match.group(),
                frozenset(readings),
                *match.span(),
                decade=bool(re.compile(r"0['’]?s\b").match(text, match.end() - 1)),
                optional=after_letter and readings == {0.0},
            )
        )
    found += [
        Number(character, frozenset({_FRACTIONS[character]}), place, place + 1)
        for place, character in enumerate(text)
        if character in _FRACTIONS
    ]
    return found


def _readings(token: str) -> Iterable[float]:
    """The readings of digits with separators: `1,000` is 1000 and 1.0, `2.5` is 2.5, `1.234.567` is 1234567."""
    groups = re.split(r"[^\d]", token)
    if len(groups) == 1:
        yield float(token)
        return
    if all(len(group) == 3 for group in groups[1:]) and len(groups[0]) <= 3:
        yield float("".join(groups))
    separators = re.findall(r"[^\d]", token)
    if len(groups) == 2:
        yield float(f"{groups[0]}.{groups[1]}")
    elif separators[-1] not in separators[:-1] and len(set(separators)) == 2:  # 1,234.5
        yield float("".join(groups[:-1]) + "." + groups[-1])
    elif len(groups[0]) > 3 or not all(len(group) == 3 for group in groups[1:]):  # a date or a section number: 2.3.1
        yield float("".join(group.rjust(4, "0") for group in groups))


def in_words(text: str, language: str) -> list[Number]:
    """Numbers written as words, ordinals, months, Roman numerals (English) and duals (Arabic)."""
    spelled = number_words.english(text) if language == "en" else number_words.arabic(text)
    found = [Number(word.text, frozenset(word.readings), 0, 0, decade=word.decade) for word in spelled]
    if language == "en":
        found += [
            Number(match.group(), frozenset({float(_ROMAN_VALUE[match.group()])}), *match.span())
            for match in _ROMAN.finditer(text)
        ]
    return found


def without_partner(wanted: Sequence[Number], available: Sequence[Number]) -> tuple[list[Number], list[Number]]:
    """Match numbers one to one; return the unmatched numbers of `wanted` and of `available`.

    Numbers with the fewest candidates are matched first.
    """
    left = list(available)
    missing = []
    for number in sorted(wanted, key=lambda number: sum(number.same(other) for other in available)):
        partner = next((other for other in left if number.same(other)), None)
        if partner is None:
            missing.append(number)
        else:
            left.remove(partner)
    return sorted(missing, key=lambda number: number.start), left


def check(source: str, translation: str) -> list[Flag]:
    """Flag numbers that the Arabic translation lost, and numbers that are not in the English source."""
    source, translation = plain(source), plain(translation)
    source_digits, source_words = _with_afternoons(source, in_digits(source)), in_words(source, "en")
    target_digits, target_words = in_digits(translation), in_words(translation, "ar")
    lost, unexplained = without_partner([n for n in source_digits if not n.optional], target_digits)
    free_words = _not_needed_for_words(source_words, target_words, translation)
    lost, _ = without_partner(lost, free_words)
    lost = [number for number in lost if not _is_one_of_something(number, source, translation)]
    explained = [*source_words, *(n for n in source_digits if n.optional)]
    invented, _ = without_partner(unexplained, explained)
    flags = []
    if lost:
        flags.append(Flag(name="numbers", detail=f"missing: {', '.join(n.text for n in lost)}"))
    if invented:
        flags.append(Flag(name="numbers", detail=f"not in the source: {', '.join(n.text for n in invented)}"))
    return flags


def _not_needed_for_words(source: list[Number], target: list[Number], translation: str) -> list[Number]:
    """Number words of the translation that do not match number words of the source, so they may match its digits.

    `two viruses` can be the dual of any noun, so each such dual in the translation accounts for one `two`.
    """
    other_duals = number_words.duals(translation) - sum(number.readings == {2.0} for number in target)
    unmatched = []
    for number in source:
        if number.readings == {2.0} and other_duals > 0:
            other_duals -= 1
        else:
            unmatched.append(number)
    return without_partner(unmatched, target)[1]


def _is_one_of_something(number: Number, source: str, translation: str) -> bool:
    """Whether `1 week` was translated as `أسبوع`, without a number."""
    if number.readings != {1.0}:
        return False
    noun = re.compile(r"[\s\-]*([a-zA-Z]+)").match(source, number.end)
    return bool(noun) and number_words.has_singular(noun.group(1).lower(), translation)


def _with_afternoons(text: str, found: Iterable[Number]) -> list[Number]:
    """Add 14 as a reading of `2 p.m.`."""
    after = re.compile(r"(?:[:.]\d\d)?\s*p\.?\s?m\b", re.IGNORECASE)
    return [
        replace(number, readings=number.readings | {value + 12 for value in number.readings})
        if after.match(text, number.end)
        else number
        for number in found
    ]
