"""Streaming safetensors: reads rows into existing memory, and writes tensors of known shape piece by piece.

Files are not memory-mapped, because mapped pages count as resident memory: converting a model should need the memory of
the result and little more.

Format (https://huggingface.co/docs/safetensors): little-endian u64 header length, JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the tensors' bytes, row-major, without gaps or overlap.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from pydantic import BaseModel

from bimedix_jax.checkpoint.dtypes import FROM_SAFETENSORS, TO_SAFETENSORS
from bimedix_jax.errors import BimedixError, listed
from bimedix_jax.files import inside, read_json, require_content, unique_pairs

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation; a larger header means a damaged or malicious file."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the leading axis (the whole tensor for a scalar)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: its bytes are [start, start + nbytes) of `path`."""

    path: Path
    start: int

    def read(self, first_row: int = 0, rows: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [first_row, first_row + rows) as a NumPy array; into `out` (C-contiguous, same dtype and shape) if
        it is given."""
        rows = (self.shape[0] - first_row if self.shape else 1) if rows is None else rows
        shape = (rows, *self.shape[1:]) if self.shape else ()
        target = np.empty(shape, self.dtype) if out is None else out
        if target.shape != shape or target.dtype != self.dtype or not target.flags.c_contiguous:
            raise ValueError(f"{self.name}: out must be C-contiguous {self.dtype}{list(shape)}")
        view = target.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first_row * self.row_bytes)
            filled = 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise BimedixError(f"{self.path} ends inside tensor {self.name}; download the file again.")
                filled += count
        return target


def _whole(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their bytes.

    Raises BimedixError for anything that is not a complete, gapless safetensors file.
    """

    def damaged(why: str) -> BimedixError:
        return BimedixError(f"{path} is not a valid safetensors file: {why}; download or export it again.")

    require_content(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise damaged("it is truncated or its header is damaged")
        if length > MAX_HEADER_BYTES:
            raise damaged(f"its header claims {length} bytes (limit {MAX_HEADER_BYTES})")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": shape, "data_offsets": [int(begin), int(end)]} if _whole(shape):
                pass
            case _:
                raise damaged(f"the entry of {name!r} is malformed")
        if kind not in FROM_SAFETENSORS:
            raise damaged(f"{name!r} has the unknown dtype {kind!r}")
        tensor = StoredTensor(name, FROM_SAFETENSORS[kind], tuple(shape), path, 8 + length + begin)
        if begin < 0 or end - begin != tensor.nbytes:
            raise damaged(f"{name!r} does not occupy the {tensor.nbytes} bytes of its shape and dtype")
        tensors.append(tensor)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise damaged(f"there is a gap or an overlap before {tensor.name!r}")
        position += tensor.nbytes
    if position > size:
        raise damaged(f"it is truncated ({size} of {position} bytes)")
    if position < size:
        raise damaged(f"{size - position} bytes at its end belong to no tensor")
    return {tensor.name: tensor for tensor in tensors}


class IndexJson(BaseModel):
    """The part of `model.safetensors.index.json` that is read."""

    weight_map: dict[str, str]


def read_index(folder: Path) -> dict[str, str]:
    """weight_map of `model.safetensors.index.json`: tensor name -> file name, as written there."""
    path = folder / INDEX_NAME
    return read_json(path, IndexJson, "download it again", unique_keys=True).weight_map


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises BimedixError for a missing or damaged file, for an index that names a path outside `folder`, and where index
    and shards differ.
    """
    if not (folder / INDEX_NAME).exists():
        return read_header(folder / SINGLE_NAME)
    weight_map = read_index(folder)
    files = {file: inside(folder, file) for file in sorted(set(weight_map.values()))}
    absent = [file for file, path in files.items() if not path.exists()]
    if absent:
        raise BimedixError(f"{folder} lacks {listed(absent)} named by its index; download the folder again.")
    tensors: dict[str, StoredTensor] = {}
    for file, path in files.items():
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != file:
                raise BimedixError(
                    f"{path} contains {name}, which the index does not assign to it; download the folder again."
                )
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise BimedixError(f"{folder} lacks {listed(absent)} named by its index; download the folder again.")
    return tensors


def weights_kind(folder: Path) -> str:
    """'safetensors', 'pickle' (.bin/.pt/.pth only) or 'none': the kind of weights in `folder`."""
    if (folder / INDEX_NAME).exists() or (folder / SINGLE_NAME).exists():
        return "safetensors"
    pattern = re.compile(r".*\.(bin|pt|pth)(\.index\.json)?")
    return "pickle" if any(pattern.fullmatch(entry.name) for entry in folder.iterdir()) else "none"


def pieces(spec: TensorSpec, target_bytes: int = 16 << 20, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first_row, rows) covering the leading axis in pieces of about target_bytes; every piece but the last has a
    multiple of `multiple` rows. A vector is one piece."""
    total = spec.shape[0] if spec.shape else 1
    if len(spec.shape) < 2:
        yield 0, total
        return
    step = max(multiple, target_bytes // max(1, spec.row_bytes) // multiple * multiple)
    for first in range(0, total, step):
        yield first, min(step, total - first)


class ShardedWriter:
    """Writes tensors of known shape, in any order and any row pieces, as one file or as shards with an index.

    Use as a context manager on a folder of `bimedix_jax.files.new_folder`, which removes everything on an error.
    Leaving the block checks that every byte of every tensor was written once.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], max_shard_bytes: int = 5_000_000_000):
        self.folder = folder
        shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in specs:
            if shards[-1] and filled + spec.nbytes > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(spec)
            filled += spec.nbytes
        count = len(shards)
        names = (
            [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self.shards = dict(zip(names, shards, strict=True))
        self.total_bytes = sum(spec.nbytes for spec in specs)
        self._files = contextlib.ExitStack()
        self._places: dict[str, tuple[int, int, TensorSpec]] = {}
        self._missing = {spec.name: spec.nbytes for spec in specs}
        if len(self._missing) != len(specs):
            raise ValueError("two tensors have the same name")

    def __enter__(self) -> Self:
        for name, specs in self.shards.items():
            header, size = _header(specs)
            file = self._files.enter_context(open(self.folder / name, "wb"))
            file.write(header)
            file.flush()
            file.truncate(len(header) + size)
            position = len(header)
            for spec in specs:
                self._places[spec.name] = (file.fileno(), position, spec)
                position += spec.nbytes
        return self

    def write(self, name: str, rows: np.ndarray, first_row: int = 0) -> None:
        """Rows [first_row, first_row + len(rows)) of tensor `name` (for a scalar or whole tensor: first_row 0)."""
        descriptor, start, spec = self._places[name]
        if rows.dtype != spec.dtype or rows.shape[1:] != spec.shape[1:]:
            raise ValueError(f"{name}: {rows.dtype}{list(rows.shape)} does not fit {spec.dtype}{list(spec.shape)}")
        view = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._missing[name] -= len(view)
        position = start + first_row * spec.row_bytes
        if position + len(view) > start + spec.nbytes or self._missing[name] < 0:
            raise ValueError(f"{name}: more bytes were written than its shape has")
        while view:
            count = os.pwrite(descriptor, view, position)
            position += count
            view = view[count:]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        if kind is not None:
            return
        unfinished = [name for name, missing in self._missing.items() if missing]
        if unfinished:
            raise ValueError(f"tensors not completely written: {listed(unfinished)}")
        if len(self.shards) > 1:
            weight_map = {spec.name: file for file, specs in self.shards.items() for spec in specs}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, int]:
    """(length prefix + JSON header, bytes of data). transformers requires the format metadata."""
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": TO_SAFETENSORS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position
