"""Translations of another text, and choices in another order: the words of the source are not where they belong.

One pair is judged by a short list of words (lexicon.py). In a file of pairs, words that go together are learned from
the file (alignment.py), and the names in both scripts count as well. A pair is unrelated if it scores as low as a
source with the translation of another one, and much lower than most pairs of the file.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from scipy.optimize import linear_sum_assignment

from bimedix_jax.curation.arabic import plain, words
from bimedix_jax.curation.checks import alignment, drugs, lexicon
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.curation.checks.segments import Pair, Segments
from bimedix_jax.data.records import LETTERS

NONE_OF, ONE_OF = 3, 6
"""So many words that the lexicon knows, none or one of them translated: one of the 3,071 pairs of TICO-19."""

NAME, TRANSLATED, UNTRANSLATED = 2.0, 1.8, -2.1
"""What a name in both scripts, a translated and an untranslated word of the lexicon add to the score of a pair."""

OTHERS = 0.97
"""A pair may be unrelated if it scores below this quantile of sources with other translations."""

RIVALS, BEATEN = 40, 0.9
"""It is unrelated unless it scores higher than this share of its source with that many other translations, and of its
translation with that many other sources. Of generic sentences, that have few words of their own, many are sound."""

MIN_JUDGED = 6
"""Words of both sides that the model must know, to judge a pair: `What are clades?` has too few."""

FOLDS = 5

SIMILAR = 0.85
"""Least similarity of the consonants of a name in both scripts."""

ORDER_MARGIN = 6.0
"""By how much another order of the choices must be better."""


def check(source: str, translation: str) -> list[Flag]:
    """Flag a translation without any of the words of medicine that its source has."""
    wanted, found = lexicon.subjects(plain(source), translation)
    if wanted < (ONE_OF if found else NONE_OF) or found > 1:
        return []
    return [Flag(name="unrelated", detail=f"{found} of {wanted} known words of the source are in the translation")]


def shared_names(source: str, translation: str) -> int:
    """How many words and long numbers of the source are in the translation, words in Latin or in Arabic letters."""
    text = plain(translation)
    latin = {word.lower() for word in re.findall(r"[A-Za-z0-9]{2,}", text)}
    spelled = sorted(form for form in drugs.spelled(text) if len(form) >= 3)
    found = len({number for number in re.findall(r"\d{2,}", plain(source)) if number in latin})
    for word in set(re.findall(r"[A-Za-z]{4,}", plain(source))):
        own = drugs.skeleton(word)
        found += word.lower() in latin or (len(own) >= 3 and any(_alike(own, other) for other in spelled))
    return found


def _alike(one: str, other: str) -> bool:
    if one[0] != other[0] or not 0.6 <= len(other) / len(one) <= 1.7:
        return False
    return one == other or SequenceMatcher(None, one, other, autojunk=False).ratio() >= SIMILAR


class Corpus:
    """What a file of pairs teaches about its words. A pair is judged by a model that has not seen its record."""

    def __init__(self, records: Sequence[Segments]) -> None:
        self._fold = {
            pair: number % FOLDS
            for number, record in enumerate(records)
            for pair in (*(pair for _, pair in record.texts), *record.choices)
        }
        self._texts = list(dict.fromkeys(pair for record in records for _, pair in record.texts))
        self._words: dict[Pair, tuple[list[str], list[str]]] = {}
        self._models: list[tuple[alignment.Model, alignment.Model]] = []
        if len(self._texts) < alignment.MIN_PAIRS:
            return
        self._words = {(e, a): (alignment.english_words(e), alignment.arabic_words(a)) for e, a in self._fold}
        for fold in range(FOLDS):
            others = [self._words[pair] for pair, own in self._fold.items() if own != fold]
            self._models.append((alignment.learn(others), alignment.learn([(a, e) for e, a in others])))

    def unrelated(self) -> set[Pair]:
        """The texts whose translation is that of another text; empty if there are too few pairs to tell."""
        if not self._models:
            return set()
        own = [self._score(pair, pair) for pair in self._texts]
        # each source with the translation of another one that the same model has not seen
        folds = [[pair for pair in self._texts if self._fold[pair] == fold] for fold in range(FOLDS)]
        others = [self._score(one, other) for fold in folds for one, other in zip(fold, _turned(fold, 7), strict=True)]
        limit = min(float(np.quantile(others, OTHERS)), float(np.median(own)) / 2)
        return {
            pair
            for pair, score in zip(self._texts, own, strict=True)
            if score < limit
            and self._gain(pair, pair)[1] >= MIN_JUDGED
            and not self._beats(pair, score, folds[self._fold[pair]])
        }

    def _beats(self, pair: Pair, score: float, fold: list[Pair]) -> bool:
        """Whether a pair scores higher than BEATEN of its source and its translation with others of the fold."""
        place = fold.index(pair)
        rivals = _turned(fold, place + 1)[: min(RIVALS, len(fold) - 1)]
        lower = [self._score(pair, other) < score for other in rivals]
        lower += [self._score(other, pair) < score for other in rivals]
        return sum(lower) > BEATEN * len(lower)

    def _score(self, source: Pair, translation: Pair) -> float:
        """How well a translation fits a source, relative to its length."""
        total, judged = self._gain(source, translation)
        english, arabic = source[0], translation[1]
        wanted, found = lexicon.subjects(plain(english), arabic)
        total += NAME * shared_names(english, arabic) + TRANSLATED * found + UNTRANSLATED * (wanted - found)
        return total / np.sqrt(max(1, judged))

    def _gain(self, source: Pair, translation: Pair) -> tuple[float, int]:
        there, back = self._models[self._fold[source]]
        english, arabic = self._words[source][0], self._words[translation][1]
        one, other = there.score(english, arabic), back.score(arabic, english)
        return one[0] + other[0], one[1] + other[1]

    def gain(self, source: Pair, translation: Pair) -> float:
        """How much better a source and the translation of another pair predict each other than by chance, 0 unknown."""
        return self._gain(source, translation)[0] if self._models else 0.0


def _turned(pairs: list[Pair], by: int) -> list[Pair]:
    """The pairs in their order, beginning with another one."""
    by %= max(1, len(pairs))
    return [*pairs[by:], *pairs[:by]]


def check_order(source: Sequence[str], translation: Sequence[str], corpus: Corpus | None = None) -> list[Flag]:
    """Flag choices whose translations are in another order, by their numbers, names and words."""
    if len(source) != len(translation) or len(source) < 2 or len(source) > len(LETTERS):
        return []
    pairs = list(zip(source, translation, strict=True))
    fit = np.array([[_fit(one, other, corpus) for other in pairs] for one in pairs])
    rows, columns = linear_sum_assignment(fit, maximize=True)
    moved = [(int(row), int(column)) for row, column in zip(rows, columns, strict=True) if row != column]
    if not moved or any(fit[row, row] > 0 or fit[row, column] <= 0 for row, column in moved):
        return []
    if sum(fit[row, column] - fit[row, row] for row, column in moved) < ORDER_MARGIN:
        return []
    where = ", ".join(f"{LETTERS[row]} is {LETTERS[column]}" for row, column in moved)
    return [Flag(name="choice_order", detail=f"the translations are in another order: {where}")]


def _fit(source: Pair, translation: Pair, corpus: Corpus | None) -> float:
    english, arabic = plain(source[0]), plain(translation[1])
    numbers = [set(re.findall(r"\d+(?:[.,]\d+)*", text)) for text in (english, arabic)]
    fit = 3.0 * len(numbers[0] & numbers[1]) - 3.0 * len(numbers[0] ^ numbers[1])
    wanted, found = lexicon.subjects(english, arabic)
    fit += 3.0 * found - (wanted - found)
    fit += 3.0 * min(2, shared_names(english, arabic))
    same = words(english) == words(arabic)
    gain = corpus.gain(source, translation) if corpus is not None else 0.0
    return fit + 3.0 * same + (gain if abs(gain) > 1 else 0.0)
