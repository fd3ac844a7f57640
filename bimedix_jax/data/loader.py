"""Batches of packed rows by step number: the same step gives the same batch on any number of processes.

Row r of the endless stream is row `r mod n` of a permutation of the n rows that `(seed, r div n)` fixes, so a batch is
a pure function of (folder, batch size, seed, step): a resumed run seeks in constant time, and nothing is skipped or
repeated at the end of an epoch.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from bimedix_jax import files
from bimedix_jax.data import pack
from bimedix_jax.data.pack import Row
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError


@dataclass(frozen=True)
class Batches:
    """This process's part of every global batch, by step; a training run reads ahead (training/pipeline.py)."""

    folder: Path
    batch_size: int  # rows of the global batch
    seed: int
    process_index: int
    process_count: int
    shuffle: bool
    epochs: int | None  # None: endless

    @cached_property
    def index(self) -> dict[str, Any]:
        """What packing wrote about the rows."""
        return read_index(self.folder)

    @cached_property
    def _rows(self) -> grain.MapDataset:
        source: Any = grain.sources.ArrayRecordDataSource([str(self.folder / pack.ROWS)])
        if len(source) != self.index["rows"]:
            raise BimedixError(
                f"{self.folder} holds {len(source)} rows, its index says {self.index['rows']}; pack it again"
            )
        rows = grain.MapDataset.source(source)
        return rows.seed(self.seed).shuffle() if self.shuffle else rows

    def __len__(self) -> int:
        """Steps in all, the last batch filled up with empty rows.

        Raises:
            BimedixError: the stream is endless.
        """
        if self.epochs is None:
            raise BimedixError("these batches have no end; give epochs to bound them")
        return -(-self.epochs * self.index["rows"] // self.batch_size)

    def rows(self, step: int) -> list[Row]:
        """This process's rows of the batch of `step`, with the segments that say which record is where."""
        share = self.batch_size // self.process_count
        return self._rows_at(step, range(self.process_index * share, (self.process_index + 1) * share))

    def at(self, step: int, positions: Iterable[int], languages: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Rows of the global batch of `step` at these positions, for processes that hold no even shares.

        With `languages`, each token's language as well; see `pack.batch`.
        """
        return pack.batch(self._rows_at(step, positions), languages)

    def _rows_at(self, step: int, positions: Iterable[int]) -> list[Row]:
        if step < 0 or (self.epochs is not None and step >= len(self)):
            raise IndexError(f"there is no step {step}")
        numbers = [step * self.batch_size + int(position) for position in positions]
        end = sys.maxsize if self.epochs is None else self.epochs * self.index["rows"]
        return [self._row(number) if number < end else self._empty() for number in numbers]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of `step`: tokens_BT, segment_ids_BT int32, loss_mask_BT bool."""
        return pack.batch(self.rows(step))

    def _row(self, number: int) -> Row:
        # past its end a MapDataset goes on with the next epoch, in that epoch's order
        data: Any = self._rows[number]
        return Row.from_bytes(data)

    def _empty(self) -> Row:
        length = self.index["sequence_length"]
        blank = np.zeros(length, np.int32)
        return Row(np.full(length, self.index["pad_id"], np.int32), blank, np.zeros(length, bool), ())


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
        raise BimedixError(f"a batch of {batch_size} rows cannot be divided among {process_count} processes; change it")
    if not 0 <= process_index < process_count:
        raise BimedixError(f"there is no process {process_index} among {process_count}; count from 0")
    found = Batches(Path(folder), batch_size, seed, process_index, process_count, shuffle, epochs)
    if not found.index["rows"]:
        raise BimedixError(f"{folder} holds no rows; pack it again")
    return found


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a packed folder.

    Raises:
        BimedixError: it is not one, or of another format version.
    """
    path = Path(folder) / pack.INDEX
    if not path.is_file():
        raise BimedixError(f"{folder} is not a packed folder; `bimedix data pack` writes one")
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("format") != pack.FORMAT:
        raise BimedixError(f"{path} has format {index.get('format')!r}, expected {pack.FORMAT!r}; pack it again")
    return index


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of the rows, after checking rows and index against the manifest.

    Raises:
        BimedixError: there is no manifest, or a file is not the one that was packed: a copy that broke off, for one.
    """
    path = Path(folder) / pack.MANIFEST
    if not path.is_file():
        raise BimedixError(f"{folder} has no {pack.MANIFEST}; pack it again")
    expected = json.loads(path.read_text(encoding="utf-8"))["files"]
    for name in (pack.ROWS, pack.INDEX):
        part = Path(folder) / name
        if not part.is_file() or files.sha256(part) != expected[name]["sha256"]:
            state = "is not the file that was packed" if part.is_file() else "is missing"
            raise BimedixError(f"{part} {state}; copy the folder again, or pack it again")
    return expected[pack.ROWS]["sha256"]


def require_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> bool:
    """Raise BimedixError if the rows were made with another tokenizer. Their chat template may be any: base models have
    none of their own.

    Returns: whether it is known to be the same; rows that a script packed need not name one.
    """
    theirs = read_index(folder).get("tokenizer")
    if theirs not in (None, tokenizer.fingerprint):
        raise BimedixError(
            f"{folder} was packed with another tokenizer (fingerprint {theirs[:12]}) than that of {tokenizer.folder} "
            f"({tokenizer.fingerprint[:12]}); pack the records again with `bimedix data pack --tokenizer "
            f"{tokenizer.folder}`"
        )
    return theirs is not None
