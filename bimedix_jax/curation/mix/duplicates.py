"""Near-duplicates among millions of texts: MinHash proposes pairs, and each pair is compared on the texts themselves.

The bands take 160 bytes of memory a text. They are sorted one by one. Texts with the same value in a band form a
group: each is paired with the first of its group and with the NEAREST ones before it. Pairs are then compared in the
order of the texts. So the first text of several similar ones is kept, and each removed text is similar to a kept one.
"""

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bimedix_jax.curation import fingerprints

NEAREST = 4
"""How many earlier texts of its group a text is paired with, besides the first; bounds the work for frequent texts."""

BLOCK = 200_000
"""Texts whose candidates are Python lists at the same time."""

CACHED_TEXTS = 4096
"""Texts whose shingles are cached, since a text may be compared with many later ones."""

_HALF = np.uint64(32)
_text = operator.itemgetter(0)


@dataclass(frozen=True)
class Duplicate:
    """Text number `row` is similar to number `of`, which is kept."""

    row: int
    of: int
    similarity: float


def find(
    bands: Sequence[np.ndarray], wanted: np.ndarray, shingles_of: Callable[[int], np.ndarray], threshold: float
) -> Iterator[Duplicate]:
    """Yield, in their order, the texts that are similar to an earlier text that is kept.

    Args:
      bands: fingerprints.bands of all texts, batch by batch, uint64 [n, BANDS] each.
      wanted: which texts take part, bool [N].
      shingles_of: returns the shingles of a text by its number (fingerprints.shingles).
      threshold: the least similarity of a duplicate.
    """
    if not len(wanted):
        return
    rows = np.flatnonzero(wanted).astype(np.uint64)
    pairs = np.empty(0, np.uint64)
    for number in range(fingerprints.BANDS):
        band = np.concatenate([batch[:, number] for batch in bands])
        pairs = np.union1d(pairs, _candidates(band[wanted], rows))
    texts = _ShingleCache(shingles_of)
    replaced: dict[int, int] = {}
    for start in range(0, len(wanted), BLOCK):
        for row, earlier in _of_block(pairs, start, start + BLOCK):
            found = _first_similar(row, earlier, replaced, texts, threshold)
            if found is not None:
                replaced[row] = found.of
                yield found


class _ShingleCache:
    """The shingles of the texts that were used last."""

    def __init__(self, shingles_of: Callable[[int], np.ndarray]) -> None:
        self._shingles_of = shingles_of
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, row: int) -> np.ndarray:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        found = self._kept[row] = self._shingles_of(row)
        if len(self._kept) > CACHED_TEXTS:
            self._kept.popitem(last=False)
        return found


def _candidates(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pairs of equal value, sorted, each as text * 2^32 + earlier text: uint64 [pairs]."""
    order = np.argsort(values, kind="stable")
    values, rows = values[order], rows[order]
    places = np.arange(len(values))
    opens = np.ones(len(values), bool)
    opens[1:] = values[1:] != values[:-1]
    first = np.maximum.accumulate(np.where(opens, places, 0))
    found = []
    for back in range(1, NEAREST + 1):
        later = places[places - back >= first]
        found.append(rows[later] << _HALF | rows[later - back])
    later = places[places - NEAREST > first]
    found.append(rows[later] << _HALF | rows[first[later]])
    return np.sort(np.concatenate(found))


def _of_block(pairs: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
    """Each text from `start` to `stop` that has candidates, with its candidates in ascending order."""
    low, high = np.searchsorted(pairs, np.array([start, stop], np.uint64) << _HALF)
    block = pairs[low:high]
    texts = block >> _HALF
    for row, group in itertools.groupby(zip(texts.tolist(), (block ^ (texts << _HALF)).tolist(), strict=True), _text):
        yield row, [earlier for _, earlier in group]


def _first_similar(
    row: int, earlier: list[int], replaced: dict[int, int], texts: _ShingleCache, threshold: float
) -> Duplicate | None:
    """The first kept text that is similar to `row`. A removed candidate is replaced by the text it duplicates."""
    for other in sorted({replaced.get(i, i) for i in earlier}):
        found = fingerprints.similarity(texts(row), texts(other))
        if found >= threshold:
            return Duplicate(row, other, found)
    return None
