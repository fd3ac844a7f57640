"""The scan of all records for mixing: the group of each record, hashes of its text, and its tokens.

Worker processes scan batches (`ScanLines`). `Columns` collects the results, about 50 bytes a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix.decontaminate import MADE_FROM, EvaluationIndex, Hit, parents_of
from bimedix_jax.data.encoding import ChatEncoder
from bimedix_jax.data.records import Record, parse
from bimedix_jax.data.tokenizer import load_tokenizer
from bimedix_jax.errors import BimedixError

Group = tuple[str, str, str, str]  # kind, language, source, licence

PARENTS = 1 + len(MADE_FROM)
"""How many numbers of a record are digests: of its id and of the ids it was made from (0 for none)."""

NUMBERS = PARENTS + 4
"""The digests are followed by exchanges, characters, tokens and supervised tokens (both 0 without a tokenizer)."""


@dataclass(frozen=True)
class Scanned:
    """A batch of records, in the order of its lines. A line that is not a valid record has group None."""

    groups: list[Group | None]
    heldout: np.ndarray  # bool [N]
    numbers: np.ndarray  # uint64 [NUMBERS, N]
    bands: np.ndarray  # uint64 [N, BANDS]
    hits: list[Hit]
    rejected: list[tuple[int, str]]  # number of the line, and the reason


def text_of(record: Record) -> str:
    """The text on which near-duplicates are compared: all turns."""
    return "\n".join(turn.value for turn in record.conversations)


@dataclass(frozen=True)
class ScanLines:
    """The task of a worker process. The tokenizer, if any, is loaded in the worker."""

    index: EvaluationIndex | None
    tokenizer: str | None  # folder
    template: str | None

    @cached_property
    def _encoder(self) -> ChatEncoder | None:
        return None if self.tokenizer is None else ChatEncoder(load_tokenizer(self.tokenizer, self.template))

    def __call__(self, lines: Sequence[tuple[int, bytes]]) -> Scanned:
        """Scan numbered lines of JSON."""
        groups: list[Group | None] = []
        numbers = np.zeros((NUMBERS, len(lines)), np.uint64)
        heldout = np.zeros(len(lines), bool)
        texts: list[np.ndarray] = []
        hits: list[Hit] = []
        rejected: list[tuple[int, str]] = []
        for row, (number, line) in enumerate(lines):
            try:
                record = parse(line, f"line {number}")
            except BimedixError as error:
                rejected.append((number, str(error)))
                groups.append(None)
                texts.append(np.empty(0, np.uint64))
                continue
            groups.append((record.kind, record.language, record.source, record.licence))
            heldout[row] = record.split == "heldout"
            hashes = fingerprints.words(text_of(record))
            numbers[:, row] = self._numbers(record)
            texts.append(fingerprints.shingles(hashes))
            hit = None if self.index is None else self.index.find(row, record, hashes)
            if hit is not None:
                hits.append(hit)
        return Scanned(groups, heldout, numbers, fingerprints.bands(texts), hits, rejected)

    def _numbers(self, record: Record) -> tuple[int, ...]:
        tokens = learned = 0
        if self._encoder is not None:
            ids, mask = self._encoder.encode(record.conversations)
            tokens, learned = len(ids), int(np.count_nonzero(mask))
        return (
            fingerprints.digest(record.id),
            *(0 if parent is None else fingerprints.digest(parent) for parent in parents_of(record)),
            sum(turn.speaker == "gpt" for turn in record.conversations),
            sum(len(turn.value) for turn in record.conversations),
            tokens,
            learned,
        )


class Columns:
    """The numbers of all records, as arrays indexed by the number of the record once `close` was called.

    Attributes:
      groups: the distinct groups; `group` is an index into it, -1 for a line that is not a valid record, int32 [N].
      heldout: bool [N].
      ids, parents: digests, uint64 [N] and [MADE_FROM, N].
      exchanges, characters, tokens, learned: uint32 [N].
      offsets, lengths: position of its line in the file of candidates, int64 and int32 [N].
      origin: number of its source, int16 [N].
    """

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self._codes: dict[Group | None, int] = {None: -1}
        self._parts: list[tuple[np.ndarray, ...]] = []

    def append(self, scanned: Scanned, offsets: np.ndarray, lengths: np.ndarray, origin: int) -> None:
        """Add a batch of source number `origin` whose lines start at `offsets`."""
        for group in scanned.groups:
            if group not in self._codes and group is not None:
                self._codes[group] = len(self.groups)
                self.groups.append(group)
        codes = np.array([self._codes[group] for group in scanned.groups], np.int32)
        digests, counts = scanned.numbers[:PARENTS], scanned.numbers[PARENTS:].astype(np.uint32)
        place = (offsets, lengths.astype(np.int32), np.full(len(lengths), origin, np.int16))
        self._parts.append((codes, scanned.heldout, digests, counts, *place))

    def close(self) -> None:
        """Join the batches into arrays.

        Raises:
            BimedixError: there are no records.
        """
        if not self._parts:
            raise BimedixError("there are no records to mix; check the sources")
        parts = list(zip(*self._parts, strict=True))
        self._parts.clear()
        joined = [np.concatenate(part, axis=-1) for part in parts]
        self.group, self.heldout, digests, counts, self.offsets, self.lengths, self.origin = joined
        self.ids, self.parents = digests[0], digests[1:]
        self.exchanges, self.characters, self.tokens, self.learned = counts

    def __len__(self) -> int:
        return len(self.group)
