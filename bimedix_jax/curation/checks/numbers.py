"""Numbers that are lost or invented in a translation, in digits or in words.

A number has a set of possible values ("readings"), since authors write numbers differently: `1,000` is 1000 or 1.0,
`5 million` is 5 or 5,000,000, `خمسة وعشرون` is 25 or the two numbers 5 and 20. Two numbers match if they have a common
reading.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bimedix_jax.curation.arabic import plain
from bimedix_jax.curation.checks import number_words
from bimedix_jax.curation.checks.flags import Flag

# digits with separators; a no-break or thin space can separate groups of digits, an ordinary space cannot
TOKEN = re.compile(r"\d+(?:[.,،'\u00a0\u202f\u2009]\d+)*")
_GROUPED = re.compile(r"(?<![\d.,/-])\d{1,3}(?: \d{3})+(?![\d/]|[.,-]\d)")  # 10 000, or two numbers
_ROMAN = re.compile(r"(?<!\w)(?=[IVXL])(?:XL|L?X{0,3})(IX|IV|V?I{0,3})(?![\w'])")
_ROMAN_VALUE = {"I": 1, "V": 5, "X": 10, "L": 50}
_FRACTIONS = {"½": 0.5, "¼": 0.25, "¾": 0.75, "⅓": 1 / 3, "⅔": 2 / 3}
_INFLUENZA = re.compile(r"H\d+N")
_POINT_BEFORE = re.compile(r"(?:^|[^\w.])[.٫]$")
_RAISED = re.compile(r"(?<=\d)[\u00b2\u00b3\u00b9\u2070-\u2079]+")  # 10⁶
# the letters before a digit: of a formula, of a unit, and of vertebrae, vitamins and the like
_NAME_BEFORE = re.compile(
    r"(?:(?<=[^A-Za-z])|^)(?:(?:Sp|Pa|Sa|p)?(?:H|C|N|O|P|S|Na|Cl|Ca|Mg|Fe)+(?:\d(?:H|C|N|O|P|S|Cl))*|[mcd]?m|[BCLTS])$"
)
# digits that end a formula which a translation may write for a name: O2, CO2, H2O2, Ca2+
_FORMULA = re.compile(
    r"(?:(?<=[\W_])|^)(?:(?:Sp|Pa|Sa|Pv|p)?C?O2|H2O?2?|N2|O3|NH[34]|[NSP]O[234]|CH4|(?:Na|Ca)?H?CO3|Ca2|Mg2|Fe[23]|Zn2|Cu2)$"
)
_TWO_OF = re.compile(r"(?:^|\s|\()?2[- ][a-z]{3,}")
_FEMININE_DUAL = re.compile(r"\w{2,}(?:تين|تان)(?!\w)")
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
        if _POINT_BEFORE.search(text, max(0, match.start() - 2), match.start()) and match.group().isdecimal():
            readings.add(float(f"0.{match.group()}"))  # .05
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
            Number(match.group(), frozenset({float(_roman(match.group()))}), *match.span())
            for match in _ROMAN.finditer(text)
        ]
    return found


def _roman(numeral: str) -> int:
    values = [_ROMAN_VALUE[letter] for letter in numeral]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


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
    """Flag numbers that the Arabic translation lost, and numbers that are not in the English source.

    `10 000` is one number or two, whichever the other text has.
    """
    source, translation = (_RAISED.sub(_as_power, plain(text)) for text in (source, translation))
    flags = _check(source, translation)
    for one, other in ((True, False), (False, True), (True, True)):
        joined = tuple(_joined(text) if wanted else text for text, wanted in ((source, one), (translation, other)))
        if flags and joined != (source, translation):
            flags = _check(*joined) and flags
    return flags


def _as_power(match: re.Match[str]) -> str:
    return "^" + unicodedata.normalize("NFKC", match.group())


def _joined(text: str) -> str:
    return _GROUPED.sub(lambda match: match.group().replace(" ", ""), text)


def _check(source: str, translation: str) -> list[Flag]:
    source_digits, source_words = _with_afternoons(source, in_digits(source)), in_words(source, "en")
    target_digits, target_words = in_digits(translation), in_words(translation, "ar")
    lost, unexplained = without_partner([n for n in source_digits if not n.optional], target_digits)
    free_words = _not_needed_for_words(source_words, target_words, translation)
    lost, _ = without_partner(lost, free_words)
    lost = [number for number in lost if not _is_one_of_something(number, source, translation)]
    lost = [number for number in lost if not _is_of_a_name(number, source, translation)]
    lost = lost[_spare_duals(lost, source_words, target_words, source, translation) :] if lost else lost
    explained = [*source_words, *(n for n in source_digits if n.optional)]
    invented, _ = without_partner(unexplained, explained)
    invented = [number for number in invented if not _FORMULA.search(translation[: number.end])]
    flags = []
    if lost:
        flags.append(Flag(name="numbers", detail=f"missing: {', '.join(n.text for n in lost)}"))
    if invented:
        flags.append(Flag(name="numbers", detail=f"not in the source: {', '.join(n.text for n in invented)}"))
    return flags


def _is_of_a_name(number: Number, source: str, translation: str) -> bool:
    """Whether a digit belongs to a formula, a unit or a name that was spelled out: O2, H2O, SpO2, m2, L1.

    If its letters are still there in Latin script, the digit was lost.
    """
    name = _NAME_BEFORE.search(source[: number.start])
    if name is None or not re.fullmatch(r"\d|1[0-2]", number.text) or _INFLUENZA.match(source, name.start()):
        return False
    return not re.search(rf"(?<![A-Za-z]){re.escape(name.group())}(?![A-Za-z])", translation, re.IGNORECASE)


def _spare_duals(lost: list[Number], source: list[Number], target: list[Number], text: str, translation: str) -> int:
    """How many of `lost`, each a 2 before a noun, may be the dual of a feminine noun: `2-point` is نقطتين."""
    if any(number.readings != {2.0} or not _TWO_OF.match(text, max(0, number.start - 1)) for number in lost):
        return 0
    two = sum(2.0 in number.readings for number in target) + sum(2.0 in number.readings for number in source)
    return max(0, len(_FEMININE_DUAL.findall(translation)) - two)


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
