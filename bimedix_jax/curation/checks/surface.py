"""Checks of script, length, truncation, untranslated English and repetition.

The thresholds are outside the range of professional translations (TICO-19); docs/results/translation.md has figures.
"""

import re
from collections import Counter

from bimedix_jax.curation.arabic import ARABIC_LETTER, LATIN_LETTER, arabic_share, plain, sentences, words
from bimedix_jax.curation.checks.doses import is_unit
from bimedix_jax.curation.checks.drugs import names
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.curation.checks.symbols import ALLELES, SPECIES, is_notation, same_notation, without_suffixes

MIN_ARABIC_SHARE = 0.5
"""Share of all letters. The lowest in TICO-19's even rows is 0.53, a sentence with two company names and a hashtag."""

MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.52, 2.0
"""Characters of the Arabic to those of the English: 0.58 to 1.8 in TICO-19 above 100 characters."""

CHOICE_LENGTH_RATIO = 0.4
"""The same for a choice, which is often shorter in Arabic: `paralysis of the facial muscles` is شلل عضلات الوجه."""

SHORT = 12
"""Characters by which lengths may differ in any case, since the lengths of single words vary."""

UNFINISHED_RATIO = 0.68
"""Below this ratio a translation must end with a punctuation mark if its source does; else it was probably cut off."""

MAX_ENGLISH_RUN = 6
"""Most consecutive English words: names of organisations and titles are often kept in brackets."""

MAX_KEPT_WORDS = 3
"""Most distinct English words in lower case outside brackets, besides units: some translators keep terms."""

MAX_KEPT_NAMES = 4
"""Most Latin words, none of them a function word, that may be names; more are English that was left."""

MAX_REPEATED_RUN = 120
"""Most words of a run that is repeated directly after itself. Repeated sentences are found at any distance."""

_END = re.compile(r"[.!?؟:؛;…\"'”»)\]%]\s*$")
_LINK = re.compile(r"https?://\S+|www\.\S+|\S+@\S+\.\w+|[#@]\w+")
_SHORT_BRACKET = re.compile(r"[(\[][^()\[\]]{1,120}[)\]]")
_ENGLISH_RUN = re.compile(r"[A-Za-z][A-Za-z'’\-]*(?:[ ,;:]+[A-Za-z][A-Za-z'’\-]*)*")
# function words of running text; names and terms that may be kept have few of them
_FUNCTION = frozenset(
    "the a is are was were be been has have had do does did will would can could may should must not this that these "
    "those it its they their he she his her you your we our i my which who when where if because but with from by to "
    "in on at as into than then there and or of for".split()
)


def check(source: str, translation: str) -> list[Flag]:
    """All checks of this module, for an Arabic translation of an English text."""
    source, translation = plain(source), plain(translation)
    flags = [check_script(source, translation), check_length(source, translation)]
    flags += [check_untranslated(source, translation), check_repetition(source, translation)]
    return [flag for flag in flags if flag is not None]


def check_choice(source: str, translation: str) -> list[Flag]:
    """The checks that hold for a few words: those without a final punctuation mark, and with freer lengths."""
    source, translation = plain(source), plain(translation)
    flags = [check_script(source, translation), check_choice_length(source, translation)]
    flags += [check_untranslated(source, translation), check_repetition(source, translation)]
    return [flag for flag in flags if flag is not None]


def check_script(source: str, translation: str) -> Flag | None:
    """Flag too few Arabic letters, without links, handles, and names and abbreviations kept from the source."""
    share = arabic_share(_LINK.sub(" ", translation))
    if share is None:
        silent = arabic_share(without_suffixes(_LINK.sub(" ", source))) is None
        return None if silent else _flag("arabic_share", "no letters at all")
    if share >= MIN_ARABIC_SHARE or same_notation(source, translation):
        return None
    share = arabic_share(_without_kept(source, _LINK.sub(" ", translation)))
    if share is None or share >= MIN_ARABIC_SHARE:
        return None if share is not None or is_notation(source) else _flag("arabic_share", "nothing is in Arabic")
    return _flag("arabic_share", f"{share:.0%} of the letters are Arabic, at least {MIN_ARABIC_SHARE:.0%} are expected")


def _without_kept(source: str, translation: str) -> str:
    """The translation without the Latin words of the source that need no translation: names, abbreviations, drugs."""
    own = set(re.findall(r"[^\W\d_]+", source))
    latin = re.findall(r"[A-Za-z\u00c0-\u024f]+", translation)
    if len(latin) > MAX_KEPT_NAMES or any(word in _FUNCTION for word in latin if len(word) > 1):
        return translation
    known = {word for word in own if word.lower() in names(source)}
    species = {word for match in SPECIES.finditer(source) for word in re.findall(r"[^\W\d_]+", match.group())}

    def kept(match: re.Match[str]) -> str:
        word = match.group()
        if word in own and (not word.islower() or word in known | species or is_unit(word)):
            return " "
        return word

    return re.sub(r"[A-Za-z\u00c0-\u024f]+", kept, translation)


def check_length(source: str, translation: str) -> Flag | None:
    """Flag a translation that is far too short or long, or short and without a final punctuation mark."""
    long, short = len(_LINK.sub("", source).strip()), len(_LINK.sub("", translation).strip())
    if long == 0:
        return None
    ratio = short / long
    if short < MIN_LENGTH_RATIO * long - SHORT / 2 or short > MAX_LENGTH_RATIO * long + 2 * SHORT:
        return _flag("length", f"{ratio:.2f} times the source's characters")
    if ratio < UNFINISHED_RATIO and _END.search(source) and not _END.search(translation):
        return _flag("length", f"{ratio:.2f} times the source's characters, and ends in mid-sentence")
    return None


def check_choice_length(source: str, translation: str) -> Flag | None:
    """Flag a choice that is far too short or long. An abbreviation may be spelled out, or a long name abbreviated."""
    long, short = len(_LINK.sub("", source).strip()), len(_LINK.sub("", translation).strip())
    if short < CHOICE_LENGTH_RATIO * long - SHORT / 2 or short > MAX_LENGTH_RATIO * long + 3 * SHORT:
        return _flag("length", f"{short / max(1, long):.2f} times the source's characters")
    return None


def check_untranslated(source: str, translation: str) -> Flag | None:
    """Flag untranslated English text: many consecutive Latin words that are also in the source."""
    own = set(words(source))
    text = _LINK.sub(" ", translation)
    outside = re.findall(r"(?<![\w\-#])[a-z][a-z'’\-]*(?![\w\-])", _SHORT_BRACKET.sub(" ", text))
    kept = [
        word for word in dict.fromkeys(outside) if word in own and not is_unit(word) and not ALLELES.fullmatch(word)
    ]
    if len(kept) > MAX_KEPT_WORDS or sum(word in _FUNCTION for word in kept) >= 2:
        return _flag("untranslated", f"{' '.join(kept[:8])} ...")
    for match in _ENGLISH_RUN.finditer(text):
        run = words(match.group())
        kept = [word for word in run if word in own]
        capitals = sum(word[:1].isupper() for word in match.group().split())
        ordinary = 0 if 2 * capitals > len(run) else sum(word in _FUNCTION for word in run)
        if len(kept) > MAX_ENGLISH_RUN or (len(kept) >= 4 and ordinary >= 2) or (len(run) >= 4 and ordinary >= 3):
            return _flag("untranslated", f"{' '.join(match.group().split()[:8])} ...")
    left = LATIN_LETTER.search(translation) and not ARABIC_LETTER.search(translation)
    if left and not is_notation(source):
        return _flag("untranslated", "nothing is in Arabic")
    return None


def check_repetition(source: str, translation: str) -> Flag | None:
    """Flag sentences or runs of words that are repeated more often than in the source."""
    expected = _repeats(source)
    for kind, number in _repeats(translation).items():
        if number > expected[kind]:
            return _flag("repetition", f"{kind} {number + 1} times")
    return None


def _repeats(text: str) -> Counter[str]:
    """How often a sentence of at least three words, a run of at least two words, and a letter are repeated."""
    found = Counter({"a sentence": 0, "a run of words": 0, "a letter": 0})
    said = Counter(tuple(words(sentence)) for sentence in sentences(text))
    found["a sentence"] = sum(number - 1 for sentence, number in said.items() if len(sentence) >= 3)
    # an abbreviation in brackets may be spelled out and then repeats the words before it
    found["a run of words"] = _stutters(words(_SHORT_BRACKET.sub(" ( ", text)))
    found["a letter"] = len(re.findall(r"([^\W\d_])\1{5,}", text))
    return found


def _stutters(text: list[str]) -> int:
    """Number of runs of at least two words that are followed by themselves, and of words three times in a row."""
    count, place = 0, 0
    while place < len(text):
        length = _stutter_at(text, place)
        count += bool(length)
        place += length or 1
    return count


def _stutter_at(text: list[str], place: int) -> int:
    """Length of the run at `place` that is followed by itself, 0 if there is none. A word may occur twice (جدا جدا)."""
    later = place
    while True:
        try:
            later = text.index(text[place], later + 1, place + MAX_REPEATED_RUN + 1)
        except ValueError:
            return 0
        length = later - place
        if later + length > len(text):
            return 0
        if text[place:later] == text[later : later + length]:
            if length >= 2:
                return length
            if text[later + 1 : later + 2] == text[place : place + 1]:
                return 3


def _flag(name: str, detail: str) -> Flag:
    return Flag.model_validate({"name": name, "detail": detail})
