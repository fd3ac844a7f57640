"""Find different sources with the same translation: the model answered many texts with one sentence."""

import hashlib
import zlib
from array import array
from collections.abc import Iterable
from difflib import SequenceMatcher

from bimedix_jax.curation.arabic import plain, words
from bimedix_jax.curation.checks.flags import Flag
from bimedix_jax.curation.checks.segments import of_records
from bimedix_jax.data.records import Record

MIN_WORDS = 4
"""Shorter translations can correctly be the same: `نعم`, `الإجابة: A. زيادة`."""

ALIKE, ALIKE_SHORT, SHORT = 0.7, 0.5, 8
"""Least share of common words of two sources that may have the same translation, since they differ by a comma or an
article only. It is lower if one of them has fewer than SHORT words, where one synonym is a large share."""

SKETCHED_WORDS = 64


class Batch:
    """The translations of one run. Add all of them before checking; then the result does not depend on their order.

    For each distinct translation it keeps a hash and sketches of two of its sources, the first and the last in sorted
    order, with two bytes per word. That is a few hundred bytes per distinct translation.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._sources: dict[bytes, tuple[bytes, bytes]] = {}
        for source, translation in pairs:
            self.add(source, translation)

    def add(self, source: str, translation: str) -> None:
        """Add a translation and its source."""
        key = _key(translation)
        if key:
            own = _sketch(source)
            low, high = self._sources.get(key, (own, own))
            self._sources[key] = (min(low, own), max(high, own))

    def add_record(self, source: Record, translation: Record) -> None:
        """Add the question or turns of a translated record, as `api.check` checks them."""
        for _, pair in of_records(source, translation).texts:
            self.add(*pair)

    def check(self, source: str, translation: str) -> Flag | None:
        """A flag if a different source has the same translation."""
        key = _key(translation)
        if key not in self._sources:
            return None
        own = _sketch(source)
        if all(_alike(own, other) for other in self._sources[key]):
            return None
        return Flag(name="same_translation", detail="a different source has the same translation")


def _key(translation: str) -> bytes:
    found = words(plain(translation))
    if len(found) < MIN_WORDS:
        return b""
    return hashlib.blake2b(" ".join(found).encode(), digest_size=16).digest()


def _sketch(source: str) -> bytes:
    hashed = (zlib.crc32(word.encode()) & 0xFFFF for word in words(plain(source))[:SKETCHED_WORDS])
    return array("H", hashed).tobytes()


def _alike(one: bytes, other: bytes) -> bool:
    if one == other:
        return True
    a, b = (array("H", sketch) for sketch in (one, other))
    wanted = ALIKE_SHORT if min(len(a), len(b)) < SHORT else ALIKE
    return SequenceMatcher(None, a, b, autojunk=False).ratio() >= wanted
