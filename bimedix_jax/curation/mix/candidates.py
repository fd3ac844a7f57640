"""The records that a set is chosen from: their lines in one file, read again by number, and what becomes of each."""

import enum
from pathlib import Path

import numpy as np

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix.scan import Columns, text_of
from bimedix_jax.data.records import Record, parse


class Fate(enum.IntEnum):
    """What becomes of a record, in the order in which it is decided."""

    KEPT = 0
    MALFORMED = 1
    HELDOUT = 2
    SAME_ID = 3
    CONTAMINATED = 4
    FAMILY = 5
    NEAR_DUPLICATE = 6
    SURPLUS = 7


MEANING = {
    Fate.KEPT: "in the set",
    Fate.MALFORMED: "no record",
    Fate.HELDOUT: "held out by its source",
    Fate.SAME_ID: "id of another record",
    Fate.CONTAMINATED: "meets the evaluation",
    Fate.FAMILY: "translation, source or chat of such a one",
    Fate.NEAR_DUPLICATE: "near-duplicate",
    Fate.SURPLUS: "more than the ratio takes",
}


class Candidates:
    """The lines, by the number of the record."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._file = path.open("rb")
        self._columns = columns

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def line(self, row: int) -> bytes:
        """The JSON of a record, with its newline."""
        self._file.seek(int(self._columns.offsets[row]))
        return self._file.read(int(self._columns.lengths[row]))

    def record(self, row: int) -> Record:
        """The record of that number."""
        return parse(self.line(row), f"record {row}")

    def shingles(self, row: int) -> np.ndarray:
        """Shingles of its text."""
        return fingerprints.shingles(fingerprints.words(text_of(self.record(row))))
