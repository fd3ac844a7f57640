"""How close a generated answer is to a reference, in any script: chrF, ROUGE-L over words, and shares of scripts.

Nothing here downloads a model. Packages for ROUGE that split text at everything but a-z and 0-9 give 0 for Arabic, so
ROUGE-L is computed here, over words of any script.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from bimedix_jax.errors import BimedixError

MIN_CLUSTERS = 10
"""Fewest records that give an interval."""
RESAMPLES = 1000
TATWEEL = "\u0640"
"""A line that lengthens an Arabic word and has no sound."""


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, in lower case, without vowel marks and tatweel.

    Compatibility forms are unified (NFKC), so that Arabic presentation forms equal plain letters. Digits of all scripts
    are those of ASCII.
    """
    plain: list[str] = []
    for letter in unicodedata.normalize("NFKC", text).casefold():
        if letter == TATWEEL or unicodedata.category(letter) == "Mn":
            continue
        digit = unicodedata.decimal(letter, None)
        plain.append(str(digit) if digit is not None else letter if letter.isalnum() else " ")
    return list("".join(plain).split())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, from 0 to 1 (Lin 2004, ROUGE-L with beta 1); 0 for no words."""
    ours, theirs = words(answer), words(reference)
    common = longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for index, other in enumerate(second, 1):
            before, row[index] = row[index], before + 1 if word == other else max(row[index], row[index - 1])
    return row[-1]


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a corpus, from 0 to 100 (Popovic 2015), by sacrebleu.

    Raises:
      BimedixError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise BimedixError(
            f"chrF needs sacrebleu ({error}); install it with `pip install bimedix_jax[data]`"
        ) from error
    return float(CHRF().corpus_score(list(answers), [list(references)]).score)


def arabic_share(text: str) -> float | None:
    """Share of Arabic among Arabic and Latin letters; None for a text without either."""
    arabic = latin = 0
    for letter in text:
        if letter.isalpha():
            name = unicodedata.name(letter, "")
            arabic += name.startswith("ARABIC")
            latin += name.startswith("LATIN")
    return arabic / (arabic + latin) if arabic + latin else None


def is_in(text: str, language: str) -> bool:
    """Whether most letters of a text are of the script of a language ("en" or "ar"); names and drugs may be foreign."""
    share = arabic_share(text)
    return share is not None and (share > 0.5) == (language == "ar")


def mean_interval(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a mean: percentiles of the bootstrap over clusters, such as the answers of one conversation.

    None with fewer than MIN_CLUSTERS clusters, or if all values are equal: resamples then differ too little or not at
    all, which says nothing about other records.
    """
    if len(set(clusters)) < MIN_CLUSTERS or len(set(values)) == 1:
        return None
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, name in zip(values, clusters, strict=True):
        sums[names[name]] += value
        counts[names[name]] += 1
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
