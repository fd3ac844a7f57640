"""Text as the checks compare it: digits and letters brought to one spelling, cut into words and sentences."""

import functools
import re
import unicodedata

ARABIC_LETTER = re.compile(r"[\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f]")
LATIN_LETTER = re.compile(r"[A-Za-z\u00c0-\u024f]")
WORD = re.compile(r"\w+(?:['’.\-]\w+)*")
SENTENCE_END = re.compile(r"(?<=[.!?؟؛…])\s+|\n+")

# Arabic-Indic and extended (Persian, Urdu) digits; the Arabic decimal and thousands separators; the per cent sign
_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹٫٬٪", "01234567890123456789.,%")
# vowel signs, the lengthening stroke, zero-width and direction marks: none of them changes what is said
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


@functools.lru_cache(maxsize=256)  # every check of a pair asks for the same two
def plain(text: str) -> str:
    """`text` with ASCII digits and without vowel signs, invisible marks and presentation forms; line breaks stay."""
    # presentation forms only: NFKC on everything would turn 10² into 102
    text = _PRESENTATION_FORM.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text)
    return _INVISIBLE.sub("", text).translate(_DIGITS)


def letters(word: str) -> str:
    """One spelling of letters that Arabic writers use for each other (أ إ آ ا, ى ي, ة ه), after `plain`."""
    return word.translate(_SAME_LETTER)


def words(text: str) -> list[str]:
    """Words and numbers of a text that went through `plain`, lower case, letters in one spelling."""
    return [letters(word).lower() for word in WORD.findall(text)]


@functools.lru_cache(maxsize=4096)
def stems(word: str) -> tuple[str, ...]:
    """An Arabic word (after `letters`), and what is left of it without each article, conjunction or preposition that
    is written together with it. Which of them is right, the caller's list of words decides."""
    cut = [word[len(prefix) :] for prefix in _PREFIXES if word.startswith(prefix) and len(word) - len(prefix) >= 2]
    return (word, *cut)


def sentences(text: str) -> list[str]:
    """Sentences and lines of a text, without blanks."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def arabic_share(text: str) -> float | None:
    """Arabic letters among all letters; None for a text without letters."""
    arabic, latin = len(ARABIC_LETTER.findall(text)), len(LATIN_LETTER.findall(text))
    return arabic / (arabic + latin) if arabic + latin else None
