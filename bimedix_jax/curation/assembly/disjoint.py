"""Keeping evaluation out of training: two sets share nothing, by id and by the text of the question."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bimedix_jax.data.records import Record, question_of
from bimedix_jax.errors import BimedixError

# Arabic vowel signs, superscript alef, Quranic marks and the stretching mark: spelling, not meaning
_ARABIC_MARKS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")
_ARABIC_LETTERS = str.maketrans({"أ": "ا", "إ": "ا", "آ": "ا", "ى": "ي", "ة": "ه"})


@dataclass(frozen=True)
class Overlap:
    """A training record that an evaluation set also holds. `by` says what is shared: `id` or `question`."""

    record: str
    evaluation: str
    by: str


class Identities:
    """What identifies the records of an evaluation set; 16 bytes a key, so that millions fit in memory."""

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
    """Every record of `train` that `evaluation` also holds."""
    known = Identities(evaluation)
    return [found for record in train if (found := known.find(record)) is not None]


def assert_disjoint(train: Iterable[Record], evaluation: Iterable[Record]) -> None:
    """Raise BimedixError if a training record is also an evaluation record, by id, PubMed id or question text."""
    found = overlaps(train, evaluation)
    if found:
        first = found[0]
        raise BimedixError(
            f"{len(found)} training records are also in the evaluation set, the first is {first.record} "
            f"({first.evaluation}, same {first.by}); assemble the training set again with that set under --evaluation"
        )


def normalise(text: str) -> str:
    """Letters and digits only, in one case and one spelling: what two copies of a question still share."""
    if text.isascii():  # nothing of what follows can change it, and it takes most of the time
        plain = text.casefold()
    else:
        plain = _ARABIC_MARKS.sub("", unicodedata.normalize("NFKC", text)).translate(_ARABIC_LETTERS).casefold()
    return " ".join(re.findall(r"\w+", plain))


def keys(record: Record) -> Iterator[tuple[str, bytes]]:
    """(what it is, 16 bytes) of all that identifies a record: id, PubMed id, question."""
    yield "id", _digest(f"id:{record.id}")
    if "pmid" in record.provenance:
        yield "id", _digest(f"pmid:{record.provenance['pmid']}")
    yield "question", _digest(f"question:{normalise(question_of(record))}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
