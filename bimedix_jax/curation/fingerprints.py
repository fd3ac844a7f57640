"""Hashes of words and of runs of words, and the MinHash bands by which near-duplicates are found.

All hashes have 64 bits and are the same in every process and on every machine. Words are those of `arabic.normalise`.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] (compiled)

from bimedix_jax.curation.arabic import normalise

SHINGLE = 5
"""Number of words in a run. The similarity of two texts is their share of common runs."""

BANDS, ROWS = 20, 6
"""Two texts are compared if all ROWS values of one of their BANDS bands are equal. That finds 99.8 % of the pairs with
similarity 0.8 (1 - (1 - 0.8^6)^20), and compares 27 % of the pairs with similarity 0.5 unnecessarily."""

SEED = 2403  # of the hash functions of MinHash; not an option, since another seed has no advantage

CACHED_WORDS = 200_000
"""Words in each of the two generations of the cache of hashes, as in tokenizer_words.py; about 60 MB in all."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2^64: 2^64 divided by the golden ratio


def digest(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class _WordHashes(dict[str, int]):
    def __init__(self) -> None:
        super().__init__()
        self._older: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        if len(self) >= CACHED_WORDS:
            self._older = dict(self)
            self.clear()
        found = self._older.get(word)
        found = self[word] = digest(word) if found is None else found
        return found


_word_hashes = _WordHashes()


def words(text: str) -> np.ndarray:
    """A hash for each word of the normalised text (`arabic.normalise`): uint64 [N]."""
    found = normalise(text).split()
    return np.fromiter(map(_word_hashes.__getitem__, found), np.uint64, len(found))


def runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """A hash for each run of `length` words: uint64 [max(0, N - length + 1)]."""
    count = len(hashes) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    found = hashes[:count].copy()
    for start in range(1, length):
        found *= _FACTOR  # modulo 2^64
        found += hashes[start : start + count]
    return found


def whole(hashes: np.ndarray) -> int:
    """One hash of all words of a text in order."""
    return int.from_bytes(hashlib.blake2b(hashes.tobytes(), digest_size=8).digest(), "little")


def shingles(hashes: np.ndarray) -> np.ndarray:
    """The distinct runs of SHINGLE words, or of all words if there are fewer. Similarity compares these."""
    return np.unique(runs(hashes, min(SHINGLE, max(1, len(hashes)))))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity: common shingles over all shingles, 0 if there are none."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / max(1, len(one) + len(other) - shared)


def bands(texts: Sequence[np.ndarray]) -> np.ndarray:
    """BANDS hashes of ROWS MinHash values each, of the shingles of each text: uint64 [N, BANDS]."""
    offsets = np.cumsum([0, *(len(text) for text in texts)]).astype(np.uint64)
    flat = np.concatenate([np.empty(0, np.uint64), *texts])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, SEED).to_rows()
    values = np.array(rows, np.uint64).reshape(len(texts), BANDS, ROWS)
    found = values[:, :, 0].copy()
    for row in range(1, ROWS):
        found *= _FACTOR
        found += values[:, :, row]
    return found


def scatter(keys: np.ndarray, name: str) -> np.ndarray:
    """Pseudo-random numbers that depend on `name` and the key only: uint64 [N] (SplitMix64, Steele et al. 2014)."""
    z = keys ^ np.uint64(digest(name))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
