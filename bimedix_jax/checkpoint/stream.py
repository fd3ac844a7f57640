"""Writing a checkpoint: a new folder of safetensors, one piece in memory at a time, behind a progress bar."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bimedix_jax.checkpoint.safetensors_io import ShardedWriter, TensorSpec
from bimedix_jax.files import new_folder

MAX_SHARD_BYTES = 5_000_000_000

Piece = tuple[str, int, np.ndarray]
"""(tensor name, first row, rows)."""


def progress(total: int, label: str) -> "tqdm[Any]":
    """A bar of bytes on stderr: silent for the first 2 seconds, and where stderr is not a terminal."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=label, delay=2.0, disable=None)


def stream_to(
    folder: str | Path,
    specs: Sequence[TensorSpec],
    pieces: Iterable[Piece],
    label: str,
    finish: Callable[[Path], Any],
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes tensors to a new folder, which appears only when it is complete; returns the folder.

    Args:
      specs: every tensor, in the order of the file; beyond `max_shard_bytes` the file is split into shards.
      pieces: the rows of all tensors, in any order. They are made while the files are being written.
      label: what the progress bar calls the work.
      finish: writes the other files, in the temporary folder that it is given, after the tensors.
    Raises:
      BimedixError: the folder is not empty and `overwrite` is False, or it cannot be written. Nothing is left behind.
      ValueError: the pieces do not fit the specs, or are incomplete.
    """
    with new_folder(folder, overwrite) as partial:
        with ShardedWriter(partial, specs, max_shard_bytes) as writer, progress(writer.total_bytes, label) as bar:
            for name, first_row, rows in pieces:
                writer.write(name, rows, first_row)
                bar.update(rows.nbytes)
        finish(partial)
    return Path(folder)
