"""Arabic script: one spelling for digits and letters, and words and sentences, as the translation checks compare them.

assembly/disjoint.py has a second normalisation, `normalise`, which finds copies of a question or text. Do not mix the
two: the hashes of existing data sets depend on `normalise`. They differ in these points:

    |               | `plain`, `letters` and `words` here         | `disjoint.normalise`                    |
    | Unicode       | NFKC of presentation forms only (10² stays) | NFKC of the whole text                  |
    | digits        | Arabic-Indic and Persian become ASCII       | unchanged                               |
    | equal letters | أ إ آ ٱ ا; ى ي; ئ ؤ ء; ة ه                  | أ إ آ ا; ى ي; ة ه                       |
    | removed marks | vowel signs, tatweel, invisible characters  | vowel signs, tatweel, Quranic marks     |
    | words         | may contain ' . - between letters           | letters, digits and underscores only    |
    | case          | lower                                       | casefold                                |
"""

import functools
import re
import unicodedata

ARABIC_LETTER = re.compile(r"[\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f]")
LATIN_LETTER = re.compile(r"[A-Za-z\u00c0-\u024f]")
WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
SENTENCE_END = re.compile(r"(?<=[.!?؟؛…])\s+|\n+")

# Arabic-Indic and extended (Persian, Urdu) digits; the Arabic decimal and thousands separators; the per cent sign
_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹٫٬٪", "01234567890123456789.,%")
# vowel signs, tatweel, zero-width and direction marks: none of them changes the meaning
_INVISIBLE = re.compile(r"[\u064b-\u065f\u0670\u0640\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\u061c\u00ad]")
_PRESENTATION_FORM = re.compile(r"[\ufb50-\ufdff\ufe70-\ufefc]")
_SAME_LETTER = str.maketrans("أإآٱىئؤة", "اااايءءه")
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
    return _INVISIBLE.sub("", text).translate(_DIGITS)


def letters(word: str) -> str:
    """One spelling for letters that Arabic writers interchange (أ إ آ ا, ى ي, ة ه). `word` is a result of `plain`."""
    return word.translate(_SAME_LETTER)


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
