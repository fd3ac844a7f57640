"""Batches of packed rows by step number: a step has the same global batch on any number of processes.

The n rows of a folder are repeated without end, in a new order each epoch. Row r of that stream is row `r mod n` of the
permutation for (seed, epoch `r div n`). A batch is therefore a pure function of folder, batch size, seed and step: a
resumed run seeks in constant time, and no row is skipped or repeated at the end of an epoch.
"""

import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np
from pydantic import BaseModel, Field

from bimedix_jax import files
from bimedix_jax.data import pack
from bimedix_jax.data.pack import Row
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError


class Records:
    """The records of one ArrayRecord file by number, for Grain. Several threads may read.

    Grain's own source opens the file twice and calls `read([i])`, which takes 5 ms of CPU time with a million records
    (array_record 0.8); `read(i, i + 1)` takes 0.01 ms.
    """

    def __init__(self, path: Path):
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] (compiled)

        options = "readahead_buffer_size:0,max_parallelism:0"  # random access: reading ahead is wasted
        self._reader = array_record_module.ArrayRecordReader(str(path), options=options, file_reader_buffer_size=32768)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, number: int) -> bytes:
        with self._lock:
            (record,) = self._reader.read(int(number), int(number) + 1)
        return record


@dataclass(frozen=True)
class Batches:
    """This process's rows of every global batch, by step. A training run prefetches them (training/pipeline.py)."""

    folder: Path
    batch_size: int  # rows of the global batch
    seed: int
    process_index: int
    process_count: int
    shuffle: bool
    epochs: int | None  # None: endless

    @cached_property
    def index(self) -> "Index":
        """What packing wrote about the rows."""
        return read_index(self.folder)

    @cached_property
    def _rows(self) -> grain.MapDataset:
        source: Any = Records(self.folder / pack.ROWS)
        if len(source) != self.index.rows:
            raise BimedixError(
                f"{self.folder} has {len(source)} rows, but its index says {self.index.rows}; pack it again"
            )
        rows = grain.MapDataset.source(source)
        return rows.seed(self.seed).shuffle() if self.shuffle else rows

    def __len__(self) -> int:
        """Number of steps. The last batch is filled up with empty rows.

        Raises:
            BimedixError: the stream is endless.
        """
        if self.epochs is None:
            raise BimedixError("these batches have no end; give epochs to bound them")
        return -(-self.epochs * self.index.rows // self.batch_size)

    def rows(self, step: int) -> list[Row]:
        """This process's rows of the batch of `step`, with the segments that tell which record each token is from."""
        share = self.batch_size // self.process_count
        return self._rows_at(step, range(self.process_index * share, (self.process_index + 1) * share))

    def at(self, step: int, positions: Iterable[int], groups: Sequence[tuple[str, str]] = ()) -> dict[str, np.ndarray]:
        """Rows of the global batch of `step` at these positions, for processes whose shares are uneven.

        With `groups` of (language, kind), the batch has each token's group as well; see `pack.groups_of`.
        """
        return pack.batch(self._rows_at(step, positions), groups)

    def _rows_at(self, step: int, positions: Iterable[int]) -> list[Row]:
        if step < 0 or (self.epochs is not None and step >= len(self)):
            raise IndexError(f"there is no step {step}")
        numbers = [step * self.batch_size + int(position) for position in positions]
        end = sys.maxsize if self.epochs is None else self.epochs * self.index.rows
        return [self._row(number) if number < end else self._empty() for number in numbers]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step`: tokens_BT, segment_ids_BT int32, loss_mask_BT bool."""
        return pack.batch(self.rows(step))

    def _row(self, number: int) -> Row:
        # an index past the end of a MapDataset is a row of the next epoch, in that epoch's order
        data: Any = self._rows[number]
        return Row.from_bytes(data)

    def _empty(self) -> Row:
        length = self.index.sequence_length
        blank = np.zeros(length, np.int32)
        return Row(np.full(length, self.index.pad_id, np.int32), blank, np.zeros(length, bool), ())


def batches(
    folder: str | Path,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    epochs: int | None = None,
) -> Batches:
    """Batches of a packed folder; `batch_size` counts the rows of all processes together.

    Raises:
        BimedixError: `folder` is not a packed folder, or the batch cannot be divided among the processes.
    """
    if batch_size < 1 or batch_size % process_count:
        raise BimedixError(
            f"a batch of {batch_size} rows cannot be divided among {process_count} processes; give a multiple of "
            f"{process_count}"
        )
    if not 0 <= process_index < process_count:
        raise BimedixError(f"there is no process {process_index} among {process_count}; count from 0")
    found = Batches(Path(folder), batch_size, seed, process_index, process_count, shuffle, epochs)
    if not found.index.rows:
        raise BimedixError(f"{folder} has no rows; pack it again")
    return found


class Group(BaseModel):
    """Counts of one language, kind and source."""

    language: str
    kind: str
    source: str
    examples: int
    tokens: int
    learned_tokens: int


class Index(BaseModel):
    """index.json of a packed folder: the keys that are read again."""

    format: str
    rows: int = Field(ge=0)
    sequence_length: int = Field(ge=1)
    pad_id: int
    tokenizer: str | None = None  # fingerprint
    groups: list[Group] = []


class FileHash(BaseModel):
    """One file of a packed folder."""

    sha256: str


class Manifest(BaseModel):
    """manifest.json of a packed folder."""

    files: dict[str, FileHash]


def read_index(folder: str | Path) -> Index:
    """The index of a packed folder.

    Raises:
        BimedixError: the folder has no index, or one of another format.
    """
    path = Path(folder) / pack.INDEX
    if not path.is_file():
        raise BimedixError(f"{folder} is not a packed folder; `bimedix data pack` writes one")
    found = files.read_json(path, dict[str, Any], "pack it again")
    if found.get("format") != pack.FORMAT:
        raise BimedixError(f"{path} has format {found.get('format')!r}, expected {pack.FORMAT!r}; pack it again")
    return files.validate(found, Index, str(path), "pack it again")


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of the rows, after checking rows and index against the manifest.

    Raises:
        BimedixError: there is no manifest, or a file differs from the one that was packed, as after an interrupted
            copy.
    """
    path = Path(folder) / pack.MANIFEST
    if not path.is_file():
        raise BimedixError(f"{folder} has no {pack.MANIFEST}; pack it again")
    expected = files.read_json(path, Manifest, "pack it again").files
    for name in (pack.ROWS, pack.INDEX):
        part = Path(folder) / name
        if not part.is_file():
            raise BimedixError(f"{part} is missing; copy the folder again, or pack it again")
        if name not in expected or files.sha256(part) != expected[name].sha256:
            raise BimedixError(f"{part} is not the file that was packed; copy the folder again, or pack it again")
    return expected[pack.ROWS].sha256


def require_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """Raise BimedixError if the rows were made with another tokenizer.

    Their chat template is not compared, since base models have none.

    Returns: whether the tokenizer is known to be the same; rows that a script packed need not name one.
    """
    theirs = read_index(folder).tokenizer
    if theirs not in (None, tokenizer.fingerprint):
        raise BimedixError(
            f"{folder} was packed with another tokenizer (fingerprint {theirs[:12]}) than that of {tokenizer.folder} "
            f"({tokenizer.fingerprint[:12]}); pack the records again with `bimedix data pack --tokenizer "
            f"{tokenizer.folder}`"
        )
    return theirs is not None
