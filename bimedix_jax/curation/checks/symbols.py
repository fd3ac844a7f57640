"""Symbols and notation: letters that name chromosomes, Greek letters, numerals of statements, and formulas."""

import re

from bimedix_jax.curation.arabic import letters, plain, words
from bimedix_jax.curation.checks import drugs, number_words
from bimedix_jax.curation.checks.flags import Flag

# symbol: how Arabic texts write it as a word of its own; a symbol of one group may be taken for another of the group
_GROUPS: tuple[dict[str, tuple[re.Pattern[str], frozenset[str]]], ...] = tuple(
    {
        name: (re.compile(english), frozenset(letters(word) for word in arabic.split()))
        for name, (english, arabic) in group.items()
    }
    for group in (
        {
            "X": (r"(?<![\w'])X(?![\w'])(?=[ -](?:chromosom|link|inactivat|bearing))", "x اكس إكس س سينية سيني السيني"),
            "Y": (r"(?<![\w'])Y(?![\w'])(?=[ -](?:chromosom|link|bearing))", "y واي ص صادي الصادي"),
        },
        {
            "alpha": (r"(?i)\balpha\b|[αΑ]", "ألفا α alpha"),
            "beta": (r"(?i)\bbeta\b|[βΒ]", "بيتا بتا β beta"),
            "gamma": (r"(?i)\bgamma\b|[γΓ]", "غاما جاما γ gamma"),
            "delta": (r"(?i)\bdelta\b|[δΔ]", "دلتا δ delta"),
            "kappa": (r"(?i)\bkappa\b|κ", "كابا κ kappa"),
            "omega": (r"(?i)\bomega\b|[ωΩ]", "أوميغا أوميجا ω omega"),
        },
    )
)
_NUMERAL = r"(?:VIII|VII|VI|IV|IX|V|X|III|II|I)"
_STATEMENTS = re.compile(
    rf"\s*(?:both |only )?{_NUMERAL}(?:(?:,? and |,? or |, ?| & ?|-){_NUMERAL})*(?: only)?\s*[.]?\s*"
)
_VALUE = {name: float(value) for value, name in enumerate("I II III IV V VI VII VIII IX X".split(), start=1)}
_ORDINAL_LETTERS = {letter: float(value) for value, letter in enumerate("ابجدهوزحطي", start=1)}

_PUNCTUATION = str.maketrans("،؛؟٪", ",;?%")
_UNITS_AND_SUFFIXES = re.compile(r"(?<=\d)(?:st|nd|rd|th|s)\b")
# two words of a Latin name of a species: Staphylococcus aureus, E. coli
SPECIES = re.compile(
    r"\b(?:[A-Z]\.|[A-Z][a-z]{2,}(?:us|a|um|is|es|er|ix|on|as)) [a-z]{2,}(?:us|um|is|ae|es|ii|i|a|ans|ens|on)\b"
)
ALLELES = re.compile(r"(?i)(?:([a-z])\1)+")  # AaBb, aabb


def check(source: str, translation: str) -> list[Flag]:
    """Flag a symbol that became another one, and numerals of statements (`I and II only`) that are lost."""
    source, translation = plain(source), plain(translation)
    found = {letters(part).lower() for word in words(translation) for part in (word, *re.split(r"[-.]", word))}
    for group in _GROUPS:
        wanted = {name for name, (english, _) in group.items() if english.search(source)}
        given = {name for name, (english, arabic) in group.items() if arabic & found or _in_latin(english, translation)}
        if wanted - given and given - wanted and wanted:
            became = f"{', '.join(sorted(wanted - given))} became {', '.join(sorted(given - wanted))}"
            return [Flag(name="symbols", detail=became)]
    if _STATEMENTS.fullmatch(source):
        numerals = re.findall(rf"\b{_NUMERAL}\b", source)
        lost = [numeral for numeral in numerals if _VALUE[numeral] not in _numerals(translation)]
        if lost:
            return [Flag(name="symbols", detail=f"the numeral {', '.join(lost)} is not translated")]
    return []


def _in_latin(english: re.Pattern[str], translation: str) -> bool:
    return bool(english.search(translation))


def _numerals(translation: str) -> set[float]:
    """The values of Roman numerals, digits, number words and labels in an Arabic text."""
    found = {_VALUE[numeral] for numeral in re.findall(rf"(?<![A-Za-z]){_NUMERAL}(?![A-Za-z])", translation)}
    found |= {float(digits) for digits in re.findall(r"\d+", translation)}
    found |= {value for number in number_words.arabic(translation) for value in number.readings}
    for word in words(translation):
        bare = word.removeprefix("و")
        found |= {_ORDINAL_LETTERS[bare]} if bare in _ORDINAL_LETTERS else set()
        found |= {1.0} if bare in ("اولا", "الاولي", "الاول") else {2.0} if bare == "ثانيا" else set()
    return found


def is_notation(text: str) -> bool:
    """Whether a text has nothing to translate: a formula, an abbreviation, a drug, a species or a short name."""
    text = SPECIES.sub(" ", plain(text))
    known = {name.lower() for name in drugs.names(text)}
    found = [word for word in re.findall(r"[^\W\d_]+", text) if word.lower() not in known | {"and", "or"}]
    found = [word for word in found if not ALLELES.fullmatch(word)]
    if any(word.islower() and len(word) > 3 for word in found):
        return False
    ordinary = [word for word in found if len(word) > 3 and word[1:].islower()]
    shouted = sum(len(word) > 4 and word.isupper() for word in found)
    return len(found) <= 3 or (not ordinary and shouted <= 1)


def same_notation(source: str, translation: str) -> bool:
    """Whether the translation is the source, apart from Arabic punctuation, and has nothing to translate."""
    one, other = (re.sub(r"\s+", "", plain(text).translate(_PUNCTUATION)).casefold() for text in (source, translation))
    return one == other and is_notation(source)


def without_suffixes(text: str) -> str:
    """The text without the endings of ordinals and decades in digits: 20th, 1950s."""
    return _UNITS_AND_SUFFIXES.sub("", text)
