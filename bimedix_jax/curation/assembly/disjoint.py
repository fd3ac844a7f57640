"""Find records that a training set and an evaluation set share, by id, PubMed id and text of the question."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bimedix_jax.curation.arabic import normalise
from bimedix_jax.data.records import Record, question_of
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Overlap:
    """A training record that is also in an evaluation set. `by` is what they share: `id` or `question`."""

    record: str
    evaluation: str
    by: str


class Identities:
    """The keys of an evaluation set, as digests of 16 bytes, so that millions fit in memory."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._owners: dict[bytes, str] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Note one evaluation record."""
        self.add_keys(record.id, keys(record))

    def add_keys(self, record: str, found: Iterable[tuple[str, bytes]]) -> None:
        """Note an evaluation record by its id and its `keys`."""
        for _, key in found:
            self._owners.setdefault(key, record)

    def __len__(self) -> int:
        return len(self._owners)

    def find(self, record: Record) -> Overlap | None:
        """The overlap of `record` with the set, None if there is none."""
        return self.find_keys(record.id, keys(record))

    def find_keys(self, record: str, found: Iterable[tuple[str, bytes]]) -> Overlap | None:
        """The overlap of the record with this id and these `keys`."""
        for by, key in found:
            if key in self._owners:
                return Overlap(record, self._owners[key], by)
        return None


def overlaps(train: Iterable[Record], evaluation: Iterable[Record]) -> list[Overlap]:
    """Every record of `train` that is also in `evaluation`."""
    known = Identities(evaluation)
    return [found for record in train if (found := known.find(record)) is not None]


def assert_disjoint(train: Iterable[Record], evaluation: Iterable[Record]) -> None:
    """Raise BimedixError if a training record has the id, PubMed id or question of an evaluation record."""
    found = overlaps(train, evaluation)
    if found:
        first = found[0]
        raise BimedixError(
            f"{len(found)} training records are also in the evaluation set, the first is {first.record} "
            f"({first.evaluation}, same {first.by}); assemble the training set again with that set under --evaluation"
        )


def keys(record: Record) -> Iterator[tuple[str, bytes]]:
    """The keys of a record: (`id` or `question`, digest of 16 bytes) for its id, PubMed id and question."""
    yield "id", _digest(f"id:{record.id}")
    if "pmid" in record.provenance:
        yield "id", _digest(f"pmid:{record.provenance['pmid']}")
    asked = question_of(record)
    yield "question", _digest(f"question:{normalise(asked) or asked}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
