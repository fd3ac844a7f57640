"""Find translations of another text, by words that go together in a file of pairs.

IBM model 1 (Brown et al. 1993, "The Mathematics of Statistical Machine Translation") is learned from the pairs
themselves, in both directions. It needs no other data and some seconds for a thousand records. A pair is scored by how
much better its words predict each other than their frequency does, with a model of other pairs only, so that a rare
word is no evidence for the only pair it occurs in. A fifth of wrong pairs does no harm: their words go together by
chance only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bimedix_jax.curation.arabic import ARABIC_LETTER, plain, words

MIN_PAIRS = 200
"""Fewer pairs teach too little."""

MOST_WORDS = 64
"""Words of a text that are used; bounds the number of combinations."""

MOST_COMBINATIONS = 3_000_000
"""Combinations of words from which a model is learned, about 100 bytes each. It does not learn from later pairs."""

ROUNDS = 5
_FREQUENCY_SHARE = 0.3  # of a word's frequency in its predicted probability

_ENDING = re.compile(r"(?<=...)(?:'s|ies|es|s|ing|ed|ly)$")
_ARABIC_ENDING = re.compile(r"(?<=...)(?:ات|ون|ين|ان|ها|هم|يه|ه|ي|وا|ا|ت)$")
_ARTICLES = ("وال", "فال", "بال", "كال", "ولل", "لل", "ال")
_STOP = frozenset(
    "the a an of in on at to for and or is are was were be been by with that this these those as from it its his her "
    "their has have had do does did can may would will there".split()
)
_ARABIC_STOP = frozenset("في علي الي عن ان هو هي هل التي الذي كان كانت هذا هذه بين مع او ثم قد لا".split())


def english_words(text: str) -> list[str]:
    """The distinct words of an English text, cut to what their inflections share."""
    found = (word for word in re.findall(r"[a-z0-9]+", plain(text).lower()) if word not in _STOP)
    return list(dict.fromkeys(_ENDING.sub("", word)[:6] for word in found))[:MOST_WORDS]


def arabic_words(text: str) -> list[str]:
    """The distinct words of an Arabic text, without prefixes and endings."""
    found = (word for word in words(plain(text)) if word not in _ARABIC_STOP)
    return list(dict.fromkeys(_root(word) for word in found))[:MOST_WORDS]


def _root(word: str) -> str:
    if not ARABIC_LETTER.search(word):
        return _ENDING.sub("", word)[:6]
    article = next((article for article in _ARTICLES if word.startswith(article) and len(word) > len(article) + 2), "")
    word = word.removeprefix(article)
    for prefix in () if article else ("و", "بل"):
        word = word[1:] if len(word) >= 5 and word[0] in prefix else word
    return _ARABIC_ENDING.sub("", _ARABIC_ENDING.sub("", word))[:5]


@dataclass(frozen=True)
class Model:
    """How often words of one side occur with words of the other, learned from pairs.

    Attributes:
      given, said: numbers of the words of the two sides. Number 0 of `given` is the empty word.
      keys: given * len(said) + said of each combination, sorted, int64 [K].
      counts: expected number of times that it explains a word, float [K].
      totals: sum of `counts` for each given word, float [G].
      frequency: number of texts with each word of the other side, int64 [S].
    """

    given: dict[str, int]
    said: dict[str, int]
    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    frequency: np.ndarray

    def score(self, given: Sequence[str], said: Sequence[str]) -> tuple[float, int]:
        """(logarithm of how much better `said` is predicted by `given` than by frequency, words that were judged).

        Words that the model has not seen are not judged.
        """
        before = np.array([self.given[word] for word in given if word in self.given], np.int64)
        after = np.array([self.said[word] for word in said if word in self.said], np.int64)
        if not len(before) or not len(after):
            return 0.0, 0
        wanted = before[:, None] * len(self.said) + after[None, :]
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        counts = np.where(self.keys[place] == wanted, self.counts[place], 0.0)
        best = (counts / (self.totals[before][:, None] + 0.5)).max(0)
        chance = (self.frequency[after] + 0.5) / self.frequency.sum()
        gain = np.log((1 - _FREQUENCY_SHARE) * best / chance + _FREQUENCY_SHARE)
        return float(gain.sum()), len(after)


def learn(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Model:
    """The model of the second side given the first, from the words of pairs."""
    sizes = np.cumsum([(len(one) + 1) * len(other) for one, other in pairs])
    pairs = pairs[: int(np.searchsorted(sizes, MOST_COMBINATIONS, "right"))]
    first, second = {"": 0}, {}
    given = [np.array([0, *(first.setdefault(word, len(first)) for word in one)]) for one, _ in pairs]
    said = [np.array([second.setdefault(word, len(second)) for word in other], np.int64) for _, other in pairs]
    starts = np.cumsum([0, *map(len, said)])
    empty = [np.empty(0, np.int64)]
    keys = np.concatenate([*empty, *((e[:, None] * len(second) + a).ravel() for e, a in zip(given, said, strict=True))])
    # the place of the word, among the words of all texts, that each combination explains
    word = np.concatenate(
        [*empty, *(np.tile(np.arange(a, b), len(e)) for a, b, e in zip(starts[:-1], starts[1:], given, strict=True))]
    )
    distinct, inverse = np.unique(keys, return_inverse=True)
    of = distinct // max(1, len(second))
    counts, totals = np.zeros(len(distinct)), np.zeros(len(first))
    chances = np.ones(len(distinct))
    for _ in range(ROUNDS):
        weights = chances[inverse]
        weights /= np.bincount(word, weights)[word]
        counts = np.bincount(inverse, weights, len(distinct))
        totals = np.bincount(of, counts, len(first))
        chances = counts / totals[of]
    frequency = np.bincount(np.concatenate([*empty, *said]), minlength=len(second))
    return Model(first, second, distinct, counts, totals, frequency)
