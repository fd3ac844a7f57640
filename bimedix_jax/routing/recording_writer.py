"""Writing a recording of routes: parts of whole records, then the manifest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from bimedix_jax import __version__, files
from bimedix_jax.errors import BimedixError
from bimedix_jax.process import folders
from bimedix_jax.routing.parts import (
    PART_ROWS,
    RECORDS,
    PartLayout,
    Routes,
    part_name,
    read_table,
    to_numpy,
    write_part,
)
from bimedix_jax.routing.recording import MANIFEST, File, LayerName, Manifest

Piece = TypeVar("Piece")
UNFINISHED = "settings.json"
"""What an unfinished recording says of how it is made, so that only the same settings continue it."""


@contextmanager
def unfinished(out: Path, settings: str, overwrite: bool) -> Iterator[Path]:
    """The folder `.NAME.recording` for a recording that may be killed and started again; renamed to `out` at the end.

    Parts that a killed process has completed under the same settings remain in it, others are removed.

    Raises:
      BimedixError: `out` may not be replaced, or another process records there.
    """
    target = out.resolve()
    files.check_replaceable(target, overwrite)
    folder = target.with_name(f".{target.name}.recording")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folders.one_writer(folder, "records"):
            if not (folder / UNFINISHED).exists() or (folder / UNFINISHED).read_text("utf-8") != settings:
                for path in folder.iterdir():
                    if path.name != folders.LOCK:
                        path.unlink()
                files.write_text(folder / UNFINISHED, settings)
            yield folder
            (folder / UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        raise BimedixError(f"cannot write to {folder} ({error.strerror}); name another folder with --out") from error
    files.check_replaceable(target, overwrite)
    with (folder / folders.WRITTEN).open("w+", encoding="utf-8") as written:
        folders.list_written(folder, written)
    files.replace_folder(folder, target)


def completed_parts(folder: Path) -> int:
    """Number of parts that are complete."""
    number = 0
    while (folder / part_name(RECORDS, number)).exists():
        number += 1
    return number


def in_parts(found: Iterable[Piece], tokens_of: Callable[[Piece], int], layers: int) -> Iterator[list[Piece]]:
    """Lists of records of about PART_ROWS token-layer rows each."""
    part: list[Piece] = []
    rows = 0
    for routes in found:
        part.append(routes)
        rows += tokens_of(routes) * layers
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
    for part in in_parts(found, lambda routes: len(routes.ids_N), layout.layers):
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
    tokens = sum(to_numpy(read_table(folder / part.name, ["tokens"])["tokens"], ()).sum() for part in records)
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
