"""A recording of routes on disk: a folder with Parquet files and a manifest. Reading it needs pyarrow, but no JAX.

    recording = Recording.open("R")
    for part in recording.parts("record", "experts"):
        part["experts"]  # [N, L, K], -1 in a slot without an expert

docs/formats.md describes the files. A folder without manifest.json is not complete.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from bimedix_jax import files
from bimedix_jax.data.roles import ROLES
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.parts import (
    COUNTS,
    RANDOM,
    RECORDS,
    TEXTS,
    TOKENS,
    PartLayout,
    read_table,
    to_numpy,
)

FORMAT = "bimedix routes 1"
MANIFEST = "manifest.json"
REMEDY = "name a folder that `bimedix routes record` or `bimedix routes import` wrote"
MISSING = ""
"""Label of a record without one."""


class LayerName(BaseModel):
    """A layer: its number in the model, and the path of its router or mixture; None if that was not told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    path: str | None = None


class File(BaseModel):
    """A file of the recording. rows: rows of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """manifest.json.

    Attributes:
      kind: "tokens", or "counts" where only sums by token id were kept.
      wide, gaps, exact: how the files store experts and real numbers, see parts.PartLayout.
      tokens, rows: number of tokens, and of tokens times layers.
      hashes: of model, adapter, data, template, tokenizer and interventions, as far as they are known.
      options: how it was made.
      too_long: ids of records that were longer than the model's context, and were not recorded.
      interventions: the rules, in the order of the bits of `done`.
      nll_floor: numerical noise of the NLL of a record, for the gate.
      notes: what else a reader must know, in sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["bimedix routes 1"] = FORMAT
    version: str
    kind: Literal["tokens", "counts"] = "tokens"
    layers: tuple[LayerName, ...]
    experts: int
    top_k: int
    columns: tuple[str, ...]
    wide: bool
    gaps: bool = False
    exact: bool = False
    random_routers: int = 0
    roles: tuple[str, ...] = ROLES
    records: int
    tokens: int
    rows: int
    hashes: dict[str, str | None]
    options: dict[str, Any]
    too_long: tuple[str, ...] = ()
    interventions: tuple[str, ...] = ()
    nll_floor: float | None = None
    notes: tuple[str, ...] = ()
    parts: tuple[File, ...]

    @property
    def layout(self) -> PartLayout:
        """How the files store the tokens."""
        return PartLayout(
            layers=len(self.layers),
            top_k=self.top_k,
            columns=self.columns,
            wide=self.wide,
            gaps=self.gaps,
            exact=self.exact,
            routers=self.random_routers,
        )

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=2) + "\n"


class Recording:
    """A complete recording.

    Attributes:
      folder: where it is. manifest: what manifest.json says.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> "Recording":
        """The recording in a folder. Files are read when they are asked for.

        Args:
          verify: read all files and compare their SHA-256 with the manifest; otherwise only their sizes.

        Raises:
          BimedixError: there is no complete recording of this format, or a file is missing or was changed.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            why = "has no manifest.json, so it is no complete recording" if folder.is_dir() else "is not a folder"
            raise BimedixError(f"{folder} {why}; {REMEDY}")
        found = files.peek_json(folder / MANIFEST).get("format")
        if found != FORMAT:
            raise BimedixError(f"{folder} has the format {found!r}, but this version reads {FORMAT!r}; {REMEDY}")
        manifest = files.read_json(folder / MANIFEST, Manifest, REMEDY)
        for part in manifest.parts:
            path = files.inside(folder, part.name)
            if not path.is_file():
                raise BimedixError(f"{folder} lacks {part.name}; copy the whole folder, or record the routes again")
            if path.stat().st_size != part.bytes or (verify and files.sha256(path) != part.sha256):
                raise BimedixError(f"{path} was changed after it was recorded; record the routes again")
        return cls(folder, manifest)

    def names(self, kind: str) -> list[str]:
        """The files of a kind (parts.TOKENS, ...), in order."""
        return [part.name for part in self.manifest.parts if part.name.startswith(f"{kind}-")]

    @property
    def layer_numbers(self) -> list[int]:
        return [layer.number for layer in self.manifest.layers]

    @cached_property
    def records(self) -> dict[str, list[Any]]:
        """The columns of the table of records, as lists."""
        tables = [read_table(self.folder / name) for name in self.names(RECORDS)]
        columns = {
            name: [value for table in tables for value in table[name].to_pylist()] for name in tables[0].schema.names
        }
        columns["labels"] = [dict(labels or ()) for labels in columns["labels"]]
        return columns

    def groups(self) -> dict[str, np.ndarray]:
        """The label of each record for every field that some record has; MISSING where it has none."""
        found = {name: self.records[name] for name in TEXTS if any(x is not None for x in self.records[name])}
        labels = self.records["labels"]
        for name in sorted({name for own in labels for name in own}):
            found.setdefault(name, [own.get(name) for own in labels])
        return {name: np.array([MISSING if x is None else x for x in values], object) for name, values in found.items()}

    def parts(self, *columns: str) -> Iterator[dict[str, np.ndarray]]:
        """Columns of the tokens, a part of the recording at a time; a part has whole records.

        Values of PAIRS are [N, L, K], those of LAYERS [N, L], others [N]. `experts` is int16 or int32, with -1 in a
        slot without an expert.

        Raises:
          BimedixError: the recording has no such column, or a file is damaged.
        """
        self.require(*columns)
        for name in self.names(TOKENS):
            yield self._arrays(name, columns)

    def require(self, *columns: str) -> None:
        """Raises BimedixError if a column of the tokens was not recorded."""
        known = [] if self.manifest.kind == COUNTS else self.manifest.layout.tokens.names
        missing = [name for name in columns if name not in known]
        if missing:
            raise BimedixError(
                f"{self.folder} has no {missing[0]} of tokens; it has {', '.join(known) or 'counts only'}. "
                "Record the routes again with what is needed"
            )

    def tokens(self, *columns: str) -> dict[str, np.ndarray]:
        """Columns of all tokens, as `parts`; they must fit into memory."""
        found = list(self.parts(*columns))
        return {name: np.concatenate([part.pop(name) for part in found]) for name in columns}

    def _arrays(self, name: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
        layout, table = self.manifest.layout, read_table(self.folder / name, columns)
        found = {column: to_numpy(table[column], layout.shape(column)) for column in columns}
        if "experts" in found:
            experts = found["experts"].astype(np.int32 if layout.wide else np.int16)
            if layout.gaps:
                experts[experts == layout.no_expert] = -1
            found["experts"] = experts
        return found

    def random_counts(self) -> np.ndarray | None:
        """[records, routers, L, E], unsigned: how often each random router chose each expert; None without any."""
        routers, layers = self.manifest.random_routers, len(self.manifest.layers)
        if not routers:
            return None
        narrow = max(self.records["tokens"], default=0) <= np.iinfo(np.uint16).max
        shape = (self.manifest.records, layers, routers, self.manifest.experts)
        found_RLME = np.empty(shape, np.uint16 if narrow else np.uint32)
        start = 0
        for name in self.names(RANDOM):
            part = to_numpy(read_table(self.folder / name, ["counts"])["counts"], ()).reshape(-1, *shape[1:])
            found_RLME[start : start + len(part)] = part
            start += len(part)
        return found_RLME.swapaxes(1, 2)

    def counts(self) -> dict[str, np.ndarray]:
        """The columns record, layer (an index), expert, id and count of a recording of kind "counts"."""
        tables = [read_table(self.folder / name) for name in self.names(COUNTS)]
        return {
            name: np.concatenate([to_numpy(table[name], ()) for table in tables]) for name in tables[0].schema.names
        }
