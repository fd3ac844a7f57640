"""The records that a set is chosen from. Their lines are in one file and are read by number."""

import enum
from pathlib import Path

import numpy as np

from bimedix_jax.curation import fingerprints
from bimedix_jax.curation.mix.scan import Columns, text_of
from bimedix_jax.data.records import Record, parse


class Decision(enum.IntEnum):
    """What mixing decided about a record: it is kept, or the first reason to leave it out."""

    KEPT = 0
    MALFORMED = 1
    HELDOUT = 2
    SAME_ID = 3
    CONTAMINATED = 4
    FAMILY = 5
    NEAR_DUPLICATE = 6
    SURPLUS = 7


MEANING = {
    Decision.KEPT: "in the set",
    Decision.MALFORMED: "not a valid record",
    Decision.HELDOUT: "held out by its source",
    Decision.SAME_ID: "same id as an earlier record",
    Decision.CONTAMINATED: "overlaps an evaluation set",
    Decision.FAMILY: "source, translation or chat of a record that overlaps one",
    Decision.NEAR_DUPLICATE: "near-duplicate",
    Decision.SURPLUS: "more than the ratio needs",
}


class Candidates:
    """Random access to the records by number."""

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
        """The shingles of its text."""
        return fingerprints.shingles(fingerprints.words(text_of(self.record(row))))
