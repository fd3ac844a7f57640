"""Near-duplicates among millions of texts: MinHash bands on disk, every pair confirmed on the texts themselves.

Each band is a file, eight bytes a text. One at a time is read and sorted; texts that share its value are candidates,
each with the first of its group and the NEAREST before it. Candidates are then taken in the order of the texts and
compared, so that what is removed resembles something that stays, and the first of its kind stays.
"""

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bimedix_jax.curation import fingerprints

NEAREST = 4
"""Earlier texts of a group that a text is compared with, besides the first: a bound where texts repeat often."""

BLOCK = 200_000
"""Texts whose candidates are in memory at a time."""

REMEMBERED = 4096
"""Texts whose shingles are kept in memory: those of a group lie far apart and are needed again."""

_HALF = np.uint64(32)
_text = operator.itemgetter(0)


@dataclass(frozen=True)
class Duplicate:
    """Text number `row` resembles number `of`, which stays."""

    row: int
    of: int
    similarity: float


class BandFiles:
    """The bands of all texts in their order, a file each, appended a batch of texts at a time."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f"band-{number}.u64" for number in range(fingerprints.BANDS)]
        self._files = [path.open("wb") for path in self.paths]

    def append(self, bands: np.ndarray) -> None:
        """Add texts; `bands` as fingerprints.bands returns them, uint64 [N, BANDS]."""
        for number, file in enumerate(self._files):
            file.write(bands[:, number].tobytes())

    def close(self) -> None:
        """Nothing more comes: `find` may read."""
        for file in self._files:
            file.close()


def find(
    bands: BandFiles, wanted: np.ndarray, shingles_of: Callable[[int], np.ndarray], threshold: float
) -> Iterator[Duplicate]:
    """Texts that resemble an earlier one that stays, in their order. The files of `bands` are overwritten.

    Args:
      bands: closed, with the bands of all texts.
      wanted: which texts take part, bool [N].
      shingles_of: the shingles of a text by its number (fingerprints.shingles), read again from where the text lies.
      threshold: the least similarity that counts.
    """
    rows = np.flatnonzero(wanted).astype(np.uint64)
    for path in bands.paths:
        _candidates(np.fromfile(path, np.uint64)[wanted], rows).tofile(path)
    texts = _Remembered(shingles_of)
    replaced: dict[int, int] = {}
    for start in range(0, len(wanted), BLOCK):
        for row, earlier in _of_block(bands.paths, start, start + BLOCK):
            found = _first_like(row, earlier, replaced, texts, threshold)
            if found is not None:
                replaced[row] = found.of
                yield found


class _Remembered:
    """The shingles of the texts that were asked for last."""

    def __init__(self, shingles_of: Callable[[int], np.ndarray]) -> None:
        self._shingles_of = shingles_of
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __call__(self, row: int) -> np.ndarray:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        found = self._kept[row] = self._shingles_of(row)
        if len(self._kept) > REMEMBERED:
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


def _of_block(paths: Sequence[Path], start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
    """Each text from `start` to `stop` that has candidates, with them in ascending order."""
    limits = np.array([start, stop], np.uint64) << _HALF
    found = [np.empty(0, np.uint64)]
    for path in paths:
        if path.stat().st_size:
            pairs = np.memmap(path, np.uint64, "r")
            low, high = np.searchsorted(pairs, limits)
            found.append(np.array(pairs[low:high]))
    pairs = np.unique(np.concatenate(found))
    texts = pairs >> _HALF
    for row, group in itertools.groupby(zip(texts.tolist(), (pairs ^ (texts << _HALF)).tolist(), strict=True), _text):
        yield row, [earlier for _, earlier in group]


def _first_like(
    row: int, earlier: list[int], replaced: dict[int, int], texts: _Remembered, threshold: float
) -> Duplicate | None:
    """The first text that stays and resembles `row`; of candidates that went, what they were removed for is tried."""
    for other in sorted({replaced.get(i, i) for i in earlier}):
        found = fingerprints.similarity(texts(row), texts(other))
        if found >= threshold:
            return Duplicate(row, other, found)
    return None
