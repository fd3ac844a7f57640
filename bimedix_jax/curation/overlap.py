"""The share of a set of answers that another set also contains. It shows how much of a held-out loss memorisation can
explain."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bimedix_jax.curation.arabic import normalise
from bimedix_jax.data.records import Record

WORDS = 8
"""Number of words in the runs that are compared; such runs rarely occur twice by chance."""


def runs(record: Record) -> set[int]:
    """Hashes, stable within a process, of all runs of WORDS words in the assistant's turns."""
    found: set[int] = set()
    for turn in record.conversations:
        if turn.speaker == "gpt":
            words = normalise(turn.value).split()
            found.update(hash(tuple(words[i : i + WORDS])) for i in range(len(words) - WORDS + 1))
    return found


def overlap(records: Iterable[Record], against: Iterable[Record]) -> list[dict[str, Any]]:
    """A row for each source of `records`, over the records with an answer of at least WORDS words.

    `seen_share` is the mean share of a record's runs that are also in `against`. `mostly_seen` is the share of records
    with more than half of their runs in `against`.
    """

    def hashes() -> Iterator[int]:
        for record in against:
            yield from runs(record)

    seen = np.unique(np.fromiter(hashes(), np.int64))
    shares: dict[str, list[float]] = defaultdict(list)
    for record in records:
        own = np.array(sorted(runs(record)), np.int64)
        if own.size:
            shares[record.source].append(float(np.isin(own, seen, assume_unique=True).mean()))
    return [
        {
            "source": source,
            "records": len(found),
            "seen_share": float(np.mean(found)),
            "mostly_seen": float(np.mean(np.array(found) > 0.5)),
        }
        for source, found in sorted(shares.items())
    ]
