"""The one normaliser of texts, and words and sentences of Arabic, for everything that compares texts.

There are three steps, each built on the one before:

- `plain`: the same text to read, in one spelling of characters: ASCII digits, no vowel signs, no tatweel, no invisible
  marks (direction marks, zero-width characters, soft hyphens), no presentation forms, Arabic ی ک ٱ for their Persian
  and Quranic forms. The translation checks read it.
- `letters`: one letter for those that Arabic writers interchange (أ إ آ ا, ى ي, ة ه).
- `normalise`: only the words, in one case and with `letters`, numbers without thousands separators. Contamination,
  duplicates and fingerprints compare it. So a change of it changes which records `bimedix data mix` keeps.
"""

import functools
import re
import unicodedata

ARABIC_LETTER = re.compile(r"[\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f]")
LATIN_LETTER = re.compile(r"[A-Za-z\u00c0-\u024f]")
_RUN = re.compile(r"\w+")
WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
SENTENCE_END = re.compile(r"(?<=[.!?؟؛…])\s+|\n+")

# Arabic-Indic and extended (Persian, Urdu) digits; the Arabic decimal and thousands separators; the per cent sign
_DIGITS = {**dict(zip("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", "01234567890123456789", strict=True)), "٫": ".", "٬": ",", "٪": "%"}
# letters of Persian and Urdu keyboards, and alef wasla
_KEYBOARDS = dict(zip("یےکٱہھۀەۃ", "ييكاههههة", strict=True))
_CHARACTERS = str.maketrans({**_DIGITS, **_KEYBOARDS})
# vowel signs, Quranic marks, tatweel, variation selectors, zero-width and direction marks: none changes the meaning
_INVISIBLE = re.compile(
    "[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\u061c"
    "\u00ad\u034f\u180e]"
)
_PRESENTATION_FORM = re.compile(r"[\ufb50-\ufdff\ufe70-\ufefc]")
_RAISED = re.compile(r"(?<=\d)(?:[\u00b2\u00b3\u00b9\u2070-\u208e]+|[\u00bc-\u00be\u2150-\u215e])")  # 10², 2½
_GROUPS = re.compile(r"(?<![^ ])\d{1,3}(?: \d{3})+(?![^ ])")
_SAME_LETTER = str.maketrans("أإآٱىئؤة", "اااايءءه")
_CHARACTERS_AND_LETTERS = {**_SAME_LETTER, **{key: to.translate(_SAME_LETTER) for key, to in _CHARACTERS.items()}}
_PREFIXES = (
    "وال",
    "فال",
    "بال",
    "كال",
    "ولل",
    "فلل",
    "لل",
    "ال",
    "وب",
    "ول",
    "وك",
    "فب",
    "فل",
    "و",
    "ف",
    "ب",
    "ل",
    "ك",
)


@functools.lru_cache(maxsize=256)  # every check of a pair calls it with the same two texts
def plain(text: str) -> str:
    """`text` with ASCII digits, without vowel signs, invisible marks and presentation forms; line breaks stay."""
    # NFKC of the whole text would turn 10² into 102
    text = _PRESENTATION_FORM.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text)
    return _INVISIBLE.sub("", text).translate(_CHARACTERS)


def letters(word: str) -> str:
    """One spelling for letters that Arabic writers interchange (أ إ آ ا, ى ي, ة ه). `word` is a result of `plain`."""
    return word.translate(_SAME_LETTER)


def normalise(text: str) -> str:
    """The words and numbers of a text in one case and one spelling, separated by spaces, so that copies compare equal.

    `4,000`, `4 000` and `٤٬٠٠٠` become 4000; 10² and 10^2 become `10 2`. The result does not change if it is
    normalised again, and no word becomes empty.
    """
    if text.isascii():  # skips the slow part, which does not change ASCII text
        folded = text.casefold()
    else:
        folded = _folded(_RAISED.sub(r" \g<0>", text))
        if not unicodedata.is_normalized("NFKC", folded):  # case folding, or a removed mark, left letters to compose
            folded = _folded(folded)
    return _GROUPS.sub(lambda match: match.group().replace(" ", ""), " ".join(_RUN.findall(folded)))


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return _INVISIBLE.sub("", text).translate(_CHARACTERS_AND_LETTERS)


def words(text: str) -> list[str]:
    """Words and numbers of a result of `plain`, in lower case and after `letters`."""
    return [letters(word).lower() for word in WORD.findall(text)]


@functools.lru_cache(maxsize=4096)
def stems(word: str) -> tuple[str, ...]:
    """An Arabic word (after `letters`), and the word without each prefix that may be an article, conjunction or
    preposition. The caller looks all of them up in a list of words, since the prefix may be part of the word."""
    cut = [word[len(prefix) :] for prefix in _PREFIXES if word.startswith(prefix) and len(word) - len(prefix) >= 2]
    return (word, *cut)


def sentences(text: str) -> list[str]:
    """Sentences and lines of a text, stripped, without empty ones."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def arabic_share(text: str) -> float | None:
    """Share of Arabic letters among Arabic and Latin letters, None for a text without letters."""
    arabic, latin = len(ARABIC_LETTER.findall(text)), len(LATIN_LETTER.findall(text))
    return arabic / (arabic + latin) if arabic + latin else None
