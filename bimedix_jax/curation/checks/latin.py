"""Latin words of an Arabic translation that its English source does not have: the translation of another text.

Translators keep names, abbreviations and units in Latin letters, but they take them from the source. Exceptions are
units, the abbreviation of words of the source (`WHO`, `ECG`), formulas (`O2`), other spellings (`anaemia`), and
Roman numerals for numbers.
"""

import re
from difflib import SequenceMatcher

from bimedix_jax.curation.arabic import plain
from bimedix_jax.curation.checks import doses, drugs
from bimedix_jax.curation.checks.flags import Flag

_LINK = re.compile(r"https?://\S+|www\.\S+|\S+@\S+\.\w+|[#@]\w+")
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d+);")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f][A-Za-z0-9\u00c0-\u024f'’]*")
_ROMAN = re.compile(r"[IVX]+")
_FORMULA = re.compile(r"(?=.*\d)(?:(?:H|C|N|O|P|S|K|Na|Cl|Ca|Mg|Fe|Li|Zn|Cu|He|Pa|Sp)\d*){1,6}[+-]?")
_SKIPPED = frozenset("a an and by for from in of on or the to with".split())
SIMILAR = 0.75
"""Least similarity of a word to one of the source that may be the same word in another spelling or form."""

# abbreviations, and the beginning of a word of the source that they may stand for, if not its initials
_STANDS_FOR = {
    "dna": "deoxyribo", "rna": "ribo", "mrna": "messenger", "ecg": "electrocardio ekg", "ekg": "electrocardio ecg",
    "eeg": "electroenceph", "emg": "electromyo", "hiv": "immunodef aids", "aids": "immunodef hiv acquired",
    "ct": "tomograph cat", "mri": "magnetic", "covid": "corona", "atp": "adenosine", "iv": "intraven fourth four",
    "im": "intramusc", "wbc": "leukocyte leucocyte white", "rbc": "erythrocyte red", "bp": "pressure blood",
    "ph": "acid", "usa": "united america us", "us": "united america usa", "uk": "united brit", "eu": "europ",
    "un": "united", "cpr": "cardiopulm resuscit", "copd": "obstructive", "uti": "urinary", "csf": "cerebrospinal",
    "nsaid": "nonsteroid anti non", "nsaids": "nonsteroid anti non", "who": "health", "tb": "tubercul", "vs": "versus",
    "cm": "centim", "std": "sexual", "hcg": "gonadotrop", "tsh": "thyroid", "acth": "corticotrop adrenocortic",
    "fsh": "follicle", "lh": "luteini", "gh": "growth", "adh": "antidiuretic vasopress", "pth": "parathyr",
    "na": "sodium", "cl": "chlor", "ca": "calcium", "fe": "iron ferr", "li": "lithium", "zn": "zinc", "cu": "copper",
    "nacl": "sodium saline", "kcl": "potassium", "hcl": "hydrochlor", "naoh": "sodium", "co": "carbon",
}  # fmt: skip


def check(source: str, translation: str) -> list[Flag]:
    """Flag Latin words of the translation that nothing in the source explains."""
    text = _ENTITY.sub(" ", _LINK.sub(" ", plain(translation)))
    found = dict.fromkeys(word for word in _LATIN.findall(text) if len(word) >= 2 and not word[1:].isdigit())
    if not found:
        return []
    source = plain(source)
    new = [word for word in found if not _explained(word, source)]
    return [Flag(name="latin_words", detail=f"not in the source: {', '.join(new[:8])}")] if new else []


def _explained(word: str, source: str) -> bool:
    lower = word.lower().rstrip("'’")
    tokens = {token.lower().rstrip("'’") for token in _LATIN.findall(source)}
    ordered = re.findall(r"[^\W\d_]+", source.lower())
    tokens |= set(ordered)
    if lower in tokens or (len(lower) >= 4 and lower in source.lower()):
        return True
    if _ROMAN.fullmatch(word) or _FORMULA.fullmatch(word):
        return True
    if doses.is_unit(lower) or doses.is_unit(lower.removesuffix("s")):
        return True
    if any(part.startswith(tuple(_STANDS_FOR.get(lower, "-").split())) for part in ordered):
        return True
    if any(_same(lower, other) or lower in drugs.also(other) for other in tokens):
        return True
    return _initials(lower, [part for part in ordered if part not in _SKIPPED])


def _same(word: str, other: str) -> bool:
    """Whether two words are one in another form or spelling: mRNA and mRNAs, anaemia and anemia."""
    short, long = sorted((word, other), key=len)
    if len(short) < 2 or short[0] != long[0]:
        return False
    if long.removesuffix("s").removesuffix("'") == short:
        return True
    return len(short) >= 4 and SequenceMatcher(None, word, other, autojunk=False).ratio() >= SIMILAR


def _initials(word: str, ordered: list[str]) -> bool:
    """Whether the letters of `word` begin consecutive words of the source."""
    return 2 <= len(word) <= 7 and word in "".join(part[0] for part in ordered)
