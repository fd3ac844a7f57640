"""The number of records of each kind and language in a set, from a ratio or from the counts of the paper."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from bimedix_jax.curation.counts import KINDS, LANGUAGES
from bimedix_jax.errors import BimedixError

Preset = Literal["paper", "paper-english", "paper-arabic"]
Counts = Mapping[tuple[str, str], int]  # (kind, language) -> records

ENGLISH = {"qa": 268_200, "mcqa": 413_600, "chat": 184_800}
"""BiMediX (arXiv 2402.13253), Table 7, in the precision of the paper (hundreds)."""

BILINGUAL = {"qa": 423_800, "mcqa": 638_100, "chat": 249_700}
"""BiMediX, Table 8."""

ARABIC = {kind: BILINGUAL[kind] - ENGLISH[kind] for kind in KINDS}
"""The difference, 445,000 in all (444,995 in the text of the paper). The ratios are 1:1.72, 1:1.84 and 1:2.85."""

PRESETS: dict[str, dict[tuple[str, str], int]] = {
    "paper": {(k, language): n[k] for k in KINDS for language, n in (("ar", ARABIC), ("en", ENGLISH))},
    "paper-english": {(kind, "en"): ENGLISH[kind] for kind in KINDS},
    "paper-arabic": {(kind, "ar"): ARABIC[kind] for kind in KINDS},
}


def parse_ratio(text: str) -> tuple[int, int]:
    """Arabic and English parts of `1:2`, in lowest terms.

    Raises:
        BimedixError: `text` is not two positive whole numbers.
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise BimedixError(f"{text!r} is not a ratio of Arabic to English; write two whole numbers, for instance 1:2")
    lowest = Fraction(int(parts[0]), int(parts[1]))
    return lowest.numerator, lowest.denominator


def by_ratio(available: Counts, ratio: tuple[int, int]) -> dict[tuple[str, str], int]:
    """The largest numbers of records that are exactly at `ratio` (Arabic, English) in each kind.

    A kind with too few records in one of the languages is left out; the caller should warn about it.

    Raises:
        BimedixError: no kind has enough of both languages.
    """
    arabic, english = ratio
    units = {k: min(available.get((k, "ar"), 0) // arabic, available.get((k, "en"), 0) // english) for k in KINDS}
    if not any(units.values()):
        have = ", ".join(f"{available.get((k, lang), 0):,} {k} {lang}" for k in KINDS for lang in LANGUAGES)
        raise BimedixError(
            f"no kind has the records for {arabic}:{english} of Arabic to English (there are {have}); "
            "add sources in the missing language, or choose a preset of one language"
        )
    return {(k, lang): n * part for k, n in units.items() for lang, part in zip(LANGUAGES, ratio, strict=True) if n}


def by_preset(available: Counts, preset: str, scale: bool) -> dict[tuple[str, str], int]:
    """The counts of a preset. With `scale`, all counts are reduced in proportion until there are enough records.

    Raises:
        BimedixError: there are too few records and `scale` is off, or scaling would leave a part empty.
    """
    wanted = PRESETS[preset]
    missing = [
        f"{kind} {language}: {available.get((kind, language), 0):,} of {n:,}"
        for (kind, language), n in wanted.items()
        if available.get((kind, language), 0) < n
    ]
    if not missing:
        return dict(wanted)
    if not scale:
        raise BimedixError(
            f"there are fewer records than preset {preset} needs ({'; '.join(missing)}); add sources, or pass "
            "--scale for a smaller set in the same proportions"
        )
    factor = min(Fraction(available.get(part, 0), n) for part, n in wanted.items())
    scaled = {part: int(n * factor) for part, n in wanted.items()}
    if not all(scaled.values()):
        (kind, language), scarcest = min(((part, available.get(part, 0)) for part in wanted), key=lambda item: item[1])
        raise BimedixError(
            f"preset {preset} cannot be scaled down far enough: there are {scarcest:,} {kind} {language}; add sources"
        )
    return scaled
