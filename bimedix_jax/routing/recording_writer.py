"""Writing a recording of routes: parts of whole records, then the manifest."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bimedix_jax import __version__, files
from bimedix_jax.errors import BimedixError
from bimedix_jax.routing.parts import PART_ROWS, RECORDS, PartLayout, Routes, read_table, write_part
from bimedix_jax.routing.recording import MANIFEST, File, LayerName, Manifest


def in_parts(found: Iterable[Routes], layers: int) -> Iterator[list[Routes]]:
    """Lists of records of about PART_ROWS token-layer rows each."""
    part: list[Routes] = []
    rows = 0
    for routes in found:
        part.append(routes)
        rows += len(routes.ids_N) * layers
        if rows >= PART_ROWS:
            yield part
            part, rows = [], 0
    if part:
        yield part


def write_parts(folder: Path, layout: PartLayout, found: Iterable[Routes]) -> None:
    """Writes the parts of a recording into a folder.

    Raises:
      BimedixError: there is no record.
    """
    first = number = 0
    for part in in_parts(found, layout.layers):
        write_part(folder, number, first, layout, part)
        first, number = first + len(part), number + 1
    if first == 0:
        raise BimedixError("there is no record to write; name files that have some")


def finish(
    folder: Path,
    *,
    layers: Sequence[LayerName],
    experts: int,
    layout: PartLayout,
    hashes: Mapping[str, str | None],
    options: Mapping[str, Any],
    **further: Any,
) -> Manifest:
    """Writes the manifest of the parts in a folder, which completes the recording. `further`: other fields of it."""
    parts = [file_of(path) for path in sorted(folder.glob("*.parquet"))]
    records = [part for part in parts if part.name.startswith(f"{RECORDS}-")]
    tokens = sum(read_table(folder / part.name, ["tokens"])["tokens"].to_numpy().sum() for part in records)
    manifest = Manifest(
        version=__version__,
        layers=tuple(layers),
        experts=experts,
        top_k=layout.top_k,
        columns=layout.columns,
        wide=layout.wide,
        gaps=layout.gaps,
        exact=layout.exact,
        random_routers=layout.routers,
        records=sum(part.rows for part in records),
        tokens=int(tokens),
        rows=int(tokens) * len(layers),
        hashes=dict(hashes),
        options=dict(options),
        parts=tuple(parts),
        **further,
    )
    files.write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def file_of(path: Path) -> File:
    """What the manifest says of a file."""
    rows = pq.read_metadata(path).num_rows
    return File(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=files.sha256(path))
